"""LLaVA on Triton behind SageMaker, with sessions that stay on their instance."""
