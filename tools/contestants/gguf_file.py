"""Writes a Llama's weights as a GGUF in float16, with the header of the packaged model's own GGUF."""

import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch

from helpers.models import DEFAULT_MODEL
from helpers.models.packaged import PACKAGED, fetch_gguf


def write(state_dict_file: str | Path, target: str | Path) -> None:
    """Writes the file that llama.cpp and OpenVINO read.

    Args:
        state_dict_file: of the packaged model, in float16.
        target: the GGUF.
    """
    with tempfile.TemporaryDirectory() as scratch:
        _write(state_dict_file, target, gguf.GGUFReader(fetch_gguf(PACKAGED[DEFAULT_MODEL], Path(scratch))))


def _write(state_dict_file: str | Path, target: str | Path, reader: gguf.GGUFReader) -> None:
    kind = reader.get_field("general.architecture").contents()
    heads, kv_heads, blocks = (
        int(reader.get_field(f"{kind}.{name}").contents())
        for name in ("attention.head_count", "attention.head_count_kv", "block_count")
    )
    writer = gguf.GGUFWriter(target, kind)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in (
            "general.architecture",
            "general.file_type",
        ):
            is_list = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(
                *(field.name, field.contents(), field.types[0]), sub_type=field.types[-1] if is_list else None
            )
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    written = set()
    for name, tensor in torch.load(state_dict_file, weights_only=True, mmap=True).items():
        if tensor.data_ptr() in written:  # the head is the embeddings
            continue
        written.add(tensor.data_ptr())
        if "q_proj" in name or "k_proj" in name:  # rotary halves become rotary pairs
            count = heads if "q_proj" in name else kv_heads
            tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        array = tensor.numpy() if tensor.dim() > 1 else tensor.float().numpy()
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
