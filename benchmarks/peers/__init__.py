"""`make bench-peers`: our engine beside other engines, each in an environment of its own.

__main__     the command
report       the tables: figures, ratios to the best peer, equal replies
play         what a peer's own process does
vllm_way, openvino_way     the peers, run by their own interpreters
*-requirements.txt         what these environments hold
vllm_site/   run first in vLLM's processes
"""
