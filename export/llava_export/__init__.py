"""From a LLaVA checkpoint to a model repository that Triton serves.

    python -m llava_export --model demo/checkpoint --output build/repositories/demo

`cli` reads the command line, `repository` fills the repository, `encoder` makes its vision encoder
(`weights`, `vision`, `mixed_precision`, `onnx_export`, `report`, `tensorrt_engine`), and `manifest`
knows when there is nothing to do.
"""
