"""Promise 1 for teachers of sound: the reference's numbers, float32; a clip in a padded batch is as if alone.

Students are in tests/promises/test_method.py.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_composer import load_teacher
from helpers import GOLDEN, assert_same_numbers

Golden = tuple[Any, dict[str, Tensor]]


@pytest.fixture(scope="module", params=["audio_base", "audio_prenet", "audio_options"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """A teacher, and the reference's arrays."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / f"{request.param}.npz").items()}
    return load_teacher(GOLDEN / f"{request.param}.pt"), arrays


def compute(teacher: Any, waveforms: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
    """Return our arrays under the reference's names."""
    mask, x = teacher.padding_mask(lengths), teacher.encode(waveforms, lengths)
    arrays = {"encoder_out": x}
    arrays["teacher_out"], ffn_outputs = teacher.forward_blocks(x, padding_mask=mask)
    assert len(ffn_outputs) == teacher.config.depth
    arrays |= {f"teacher_ffn_{i}": ffn_output for i, ffn_output in enumerate(ffn_outputs)}
    arrays |= {f"teacher_block_{i}": layer for i, (layer, _) in enumerate(teacher.iterate_blocks(x, padding_mask=mask))}
    arrays["targets"] = teacher.targets(x, final_layer_norm=True, padding_mask=mask)
    arrays["targets_as_configured"] = teacher.targets(x, "drop", padding_mask=mask)
    encoder = teacher.encoder
    padding_BN = None if mask is None else mask[:, teacher.num_extra_tokens :]
    arrays["local_features"] = encoder.local_features(waveforms, lengths)
    arrays["positions"] = encoder.positions(arrays["local_features"], padding_BN)
    inputs: Any = SimpleNamespace(values=waveforms, lengths=lengths)
    x = arrays["encoder_norm"] = encoder.embed_tokens(inputs)
    for i, (block, bias) in enumerate(zip(encoder.block_list, encoder.block_contexts(x, mask), strict=True)):
        x, arrays[f"prenet_ffn_{i}"] = block(x, bias)
        arrays[f"prenet_block_{i}"] = x
    return arrays


def test_teacher(golden: Golden) -> None:
    teacher, arrays = golden
    assert_same_numbers(teacher.encoder.prepare(arrays["waveforms"]), arrays["inputs"])
    ours = compute(teacher, arrays["waveforms"])
    compared = {name for name in arrays if name.startswith(("prenet_", "teacher_", "targets"))}
    assert compared <= ours.keys()
    for name in ours.keys() & arrays.keys():
        assert_same_numbers(ours[name], arrays[name])
    contexts = [*teacher.encoder.block_contexts(ours["encoder_norm"]), *teacher.block_contexts(ours["encoder_out"])]
    biases, reference = torch.cat(contexts), arrays["alibi"].expand(len(contexts), -1, -1, -1)
    assert_same_numbers(biases[:, : reference.shape[1]], reference)
    assert not biases[:, reference.shape[1] :].any()


def test_averaged_weights(golden: Golden, request: pytest.FixtureRequest) -> None:
    teacher, arrays = golden
    name = request.node.callspec.params["golden"]
    averaged = load_teacher(GOLDEN / f"{name}.pt", weights="ema")
    assert averaged.config == teacher.config
    ours = compute(averaged, arrays["waveforms"])
    compared = {name for name in arrays if name.startswith("ema_")}
    assert len(compared) > teacher.config.depth
    for name in compared:
        assert_same_numbers(ours[name.removeprefix("ema_")], arrays[name])


def test_a_clip_in_a_padded_batch_gives_what_it_gives_alone(golden: Golden) -> None:
    teacher, arrays = golden
    clips, lengths = padded_waveforms(arrays), arrays["lengths"]
    ours = compute(teacher, clips, lengths)
    assert torch.equal(teacher.padding_mask(lengths), arrays["padded_frame_mask"])
    for i in range(len(lengths)):
        prefix = f"alone_{i}_"
        alone = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        assert len(alone) > teacher.config.depth
        for name, reference in alone.items():
            assert_same_numbers(ours[name][i : i + 1, : reference.shape[1]], reference)


def padded_waveforms(arrays: dict[str, Tensor]) -> Tensor:
    """Return waveforms that normalization turns into the padded inputs, with noise behind their ends."""
    padding, clips = arrays["padding_mask"], arrays["padded_inputs"].double()
    variance_B1 = clips.square().sum(dim=1, keepdim=True) / (~padding).sum(dim=1, keepdim=True)
    waveforms = clips * (1e-5 / (1 - variance_B1)).sqrt()  # variance = v / (v + 1e-5), with v that of the waveform
    noise = torch.randn(padding.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(padding, noise, waveforms.float())


def test_short_clips(golden: Golden) -> None:
    teacher, arrays = golden
    for name in {name.removesuffix("_inputs") for name in arrays if name.startswith("short_")} - arrays.keys():
        x = teacher.encode(arrays[f"{name}_inputs"])
        assert_same_numbers(teacher.forward_blocks(x)[0], arrays[f"{name}_teacher_out"])
