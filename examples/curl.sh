#!/bin/sh
# A session with curl and nothing else.
#
#     sh examples/curl.sh [localhost:8000] [picture]
#
# The picture travels as base64 text inside the JSON request, once; the second question travels
# alone. The answers are in "outputs", under "text_output".
set -eu
address=${1:-localhost:8000}
picture=${2:-$(ls "$(dirname "$0")"/pictures/* | head -n 1)}
session="example-$$-$(date +%s)"

ask() {
    curl --silent --show-error --fail-with-body --data-binary @- \
        "http://$address/v2/models/llava/infer"
    echo
}

# Open the session: the picture and a question.
ask <<JSON
{
  "parameters": {"sequence_id": "$session", "sequence_start": true},
  "inputs": [
    {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["$(base64 <"$picture" | tr -d '\n')"]},
    {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["Describe the picture."]}
  ]
}
JSON

# Ask on, say how to answer, and end the session.
ask <<JSON
{
  "parameters": {"sequence_id": "$session", "sequence_end": true},
  "inputs": [
    {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["How many shapes are there?"]},
    {"name": "sampling_parameters", "shape": [1], "datatype": "BYTES", "data": ["{\"max_tokens\": 32}"]}
  ]
}
JSON
