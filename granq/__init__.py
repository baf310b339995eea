"""GranQ: zero-shot quantization with per-sample, per-channel scales, measured in the open.

The pipeline, one module a step:

1. ``quantizer``  a scale and a zero point for every group of values; quantize, dequantize
2. ``schemes``    granq, strict, layerwise, per_channel, foldable: what is quantized, as data
3. ``convert``    a fake-quantized copy of any network (``graph``); ``scaling`` one convolution executed in four ways
4. ``data``       datasets by name; ``models`` teachers by name
5. ``generator``  images from noise that match the teacher's BatchNorm statistics
6. ``qat``        the student is fine-tuned on them, with the ``losses``; ``match`` is our own recipe on top
7. ``runs``       a run from its settings (``config``) to a result on disk
8. ``integer``    a foldable student as integer convolutions, exported to safetensors and ONNX

``measure`` makes data frames of a model and images, ``show`` pictures of data frames, ``app`` the command line.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
