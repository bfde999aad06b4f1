"""LLaVA on Triton behind SageMaker's `invoke_endpoint`, with sessions that stay on their instance."""
