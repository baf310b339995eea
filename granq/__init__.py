"""GranQ: zero-shot quantization with per-sample, per-channel scales, measured in the open.

The pipeline, one module a step:

1. ``quantizer``  choose a scale and a zero point for every group of values, quantize, dequantize
2. ``convert``    schemes (release, strict, layerwise, per_channel); a fake-quantized copy of any network
3. ``data``       datasets by name; ``models`` teachers by name
4. ``generator``  images from noise that match the teacher's BatchNorm statistics
5. ``qat``        the student is fine-tuned on them
6. ``cli``        the command line
"""

__version__ = "0.1.0"

from granq.convert import SCHEMES, Scheme, activation_places, calibrate, freeze_ranges, quantize_model
from granq.data import DataSpec, describe_data, load_split
from granq.generator import Generator, build_generator, synthesize
from granq.models import build_network, load_teacher, save_teacher, top1_on, train_teacher
from granq.qat import QATConfig, Result, quick, train
from granq.quantizer import GRANULARITIES, QParams, choose_qparams, dequantize, fake_quantize, quantize

__all__ = [
    "GRANULARITIES", "SCHEMES", "DataSpec", "Generator", "QATConfig", "QParams", "Result", "Scheme",
    "activation_places", "build_generator", "build_network", "calibrate", "choose_qparams", "dequantize",
    "describe_data", "fake_quantize", "freeze_ranges", "load_split", "load_teacher", "quantize", "quantize_model",
    "quick", "save_teacher", "synthesize", "top1_on", "train", "train_teacher",
]  # fmt: skip
