"""The harness behind ``pytest --benchmark``.

protocol    measures the implementations of one case together: verified, warmed up, interleaved, with a cold L2
verify      errors against fp64, and the bound beyond which a result is wrong
rows        what a row of the report says: the keys of ``extra_info``
kernels     cases of single ops: the calls of whole networks, with the ATen sequences of ``eager`` beside them
networks    cases of blocks and of whole networks, with their peers
cudnn_graphs, jax_peer, onnx_peer   peers from packages that need not be installed
"""
