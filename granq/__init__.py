"""GranQ: zero-shot quantization with per-sample, per-channel scales, measured in the open.

The pipeline, one module a step:

1. ``quantizer``  choose a scale and a zero point for every group of values, quantize, dequantize
2. ``convert``    schemes (release, strict, layerwise, per_channel, foldable); a fake-quantized copy of any network;
                  ``scaling`` one quantized convolution executed in four ways
3. ``data``       datasets by name; ``models`` teachers by name
4. ``generator``  images from noise that match the teacher's BatchNorm statistics
5. ``qat``        the student is fine-tuned on them: by the settings in ``config``, from what ``calibration`` left, with
                  the ``losses``; ``runs`` keeps every run, ``sweep`` plans many, ``distributed`` spreads one
6. ``analysis``   measure_*: model and images in, tidy data frame out; ``factorial`` what each choice of a scheme
                  costs; ``auditing`` what is really quantized
7. ``integer``    a foldable student as integer convolutions, exported to safetensors and ONNX
8. ``figures``    plot_*: data frame in, picture out; ``registry`` every picture by name; ``bench`` timings
9. ``cli``        the command line; ``explore`` the sliders of the notebooks, ``gallery`` six traps

Below all of them: ``checks``, bad input in one sentence, and ``files``, which are whole or not there.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names by module, imported at first use: ``granq --help`` and ``import granq`` stay quick.
_PUBLIC = {
    "analysis": "decode_pixels layer_names measure_activation_distortion measure_channel_histograms "
    "measure_channel_scales measure_generated_images measure_layer_error measure_scale_maps "
    "measure_synthetic_gap sqnr_db",
    "auditing": "audit summarize_audit",
    "bench": "measure_latency_quantizer measure_latency_scaling",
    "calibration": "calibrate learn_steps reestimate_batchnorm set_image_range",
    "config": "QATConfig",
    "convert": "SCHEMES Scheme activation_places freeze_ranges quantize_model",
    "data": "DataSpec batches describe_data load_split pixel_bounds",
    "figures": "plot_accuracy_bits plot_activation_distortion plot_channel_histogram plot_channel_error "
    "plot_channel_scales plot_granularity_factorial plot_granularity_maps plot_layer_error "
    "plot_quantizer_latency plot_results_table plot_scaling_latency plot_synthetic_gap "
    "plot_synthetic_images plot_training_curves plot_true_bits results_table save_figure",
    "generator": "Generator build_generator random_shapes refine synthesize vary",
    "integer": "export_onnx integer_model measure_integer_agreement save_integers",
    "models": "build_network digits_teacher load_teacher save_teacher top1_on train_teacher",
    "registry": "FIGURES Setting make_figures redraw_figures",
    "qat": "Result train",
    "quantizer": "GRANULARITIES QParams choose_qparams compile_quantizer dequantize fake_quantize quantize",
    "runs": "SavedRun load_generator load_run",
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'granq' has no attribute {name!r}")
    value = getattr(import_module(f"granq.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
