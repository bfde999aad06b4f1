"""The process on port 8080: SageMaker's HTTP contract in front of Triton's gRPC."""
