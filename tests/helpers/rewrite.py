"""The model of a file with its matrices in another type, by the `gguf` package alone."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType


def rewrite(source, target, kind, **tokenizer):
    """Every tensor in F32, or matrices whose rows it fits in type `kind`; returns the new path.

    `tokenizer` has texts and flags for keys `tokenizer.*`, which replace the file's.
    """
    changes = {f"tokenizer.{name.replace('__', '.')}": value for name, value in tokenizer.items()}
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changes:
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, value in changes.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        numbers = numbers.reshape(tensor.shape[::-1].tolist())
        fits = numbers.ndim > 1 and numbers.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        to = kind if fits else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
