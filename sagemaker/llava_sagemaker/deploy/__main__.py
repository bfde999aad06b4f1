"""`python -m llava_sagemaker.deploy`."""

from llava_sagemaker.deploy.cli import app

app(prog_name="llava-sagemaker")
