"""A SageMaker endpoint on this machine: instances behind sticky routing, for the boto3 client."""
