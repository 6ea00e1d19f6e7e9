"""The method on one page: distill a frozen data2vec 2.0 teacher into a small student, without labels.

usage: python recipes/minimal.py

The script needs torch, torchvision, safetensors, Streaming and Pillow. Teacher and student share one frozen encoder;
only the student's blocks are trained. At every token, the mean of the normalized FFN outputs of the student's blocks
regresses the mean of the normalized FFN outputs of the teacher's blocks.

Sources: data2vec 2.0 (Baevski et al. 2022, arXiv:2212.07525); ALiBi (Press et al. 2022, arXiv:2108.12409); a thesis
chapter on distilled unimodal data2vec 2.0 (Tim Cares 2024, github.com/TimCares/MasterThesis).
Shapes: B images, S pixels a side, E extra tokens (CLS), N patches, T = E + N tokens, D channels, H heads, K = D / H; a
bank of M images, Q queries; L layers.
"""

import io
import json
import math
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from streaming import StreamingDataset
from torch import Tensor, nn
from torch.nn.functional import gelu, instance_norm, layer_norm, mse_loss, normalize, pad, scaled_dot_product_attention
from torch.utils.data import DataLoader
from torchvision.transforms import v2 as transforms

DATA = Path(__file__).parents[1] / "yamls" / "quickstart"  # a toy teacher, and 4,480 + 2,000 images of CIFAR-10
DEPTH, MLP_RATIO = 5, 3.0  # the student's blocks
STEPS, WARMUP, BATCH_SIZE = 600, 60, 32  # the chapter: 30,000, 3,000 and 256
LEARNING_RATE = 4e-3  # the chapter: 5e-4


# 1. Images, read from MDS shards by Streaming. Training does not read the labels.
class Images(StreamingDataset):
    def __init__(self, split: str, *augmentation: nn.Module, **options) -> None:
        super().__init__(local=str(DATA / "cifar10" / split), batch_size=BATCH_SIZE, **options)
        standardize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # as for the teacher
        to_float = transforms.ToDtype(torch.float32, scale=True)
        self.transform = transforms.Compose([*augmentation, transforms.ToImage(), to_float, standardize])

    def __getitem__(self, index) -> tuple[Tensor, int]:
        sample = super().__getitem__(index)
        return self.transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]


# 2. The models. Their parameters have fairseq's names, so that its files load. Sizes are those in the teacher's file.
class Block(nn.Module):
    """A post-norm transformer block; returns its output and its FFN output, each (B, T, D)."""

    def __init__(self, sizes: dict, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = sizes["num_heads"]
        dim, hidden, eps = sizes["embed_dim"], int(sizes["embed_dim"] * mlp_ratio), sizes["norm_eps"]
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)

    def forward(self, x_BTD: Tensor, bias_HTT: Tensor | None) -> tuple[Tensor, Tensor]:
        qkv = self.attn["qkv"](x_BTD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended_BHTK = scaled_dot_product_attention(*qkv, attn_mask=bias_HTT)
        x_BTD = self.norm1(x_BTD + self.attn["proj"](attended_BHTK.transpose(1, 2).flatten(2)))
        ffn_BTD = self.mlp["fc2"](gelu(self.mlp["fc1"](x_BTD)))
        return self.norm2(x_BTD + ffn_BTD), ffn_BTD


class Layers(nn.Module):
    """A norm, if given, then blocks; returns the last block's output and every block's FFN output, each (B, T, D)."""

    def __init__(self, sizes: dict, depth: int, mlp_ratio: float, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()
        self.bias_HTT: Tensor | None = None  # the teacher has no ALiBi
        self.blocks = nn.ModuleList(Block(sizes, mlp_ratio) for _ in range(depth))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, list[Tensor]]:
        x_BTD, ffn_outputs = self.norm(x_BTD), []
        for block in self.blocks:
            x_BTD, ffn_BTD = block(x_BTD, self.bias_HTT)
            ffn_outputs.append(ffn_BTD)
        return x_BTD, ffn_outputs


class Encoder(nn.Module):
    """The part that teacher and student share: patches, positions, CLS, a LayerNorm and the teacher's first blocks."""

    def __init__(self, sizes: dict) -> None:
        super().__init__()
        dim, patch = sizes["embed_dim"], sizes["patch_size"]
        self.local_encoder = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        positions_1ND = torch.zeros(1, (sizes["image_size"] // patch) ** 2, dim)
        self.fixed_positional_encoder = nn.ParameterDict({"positions": positions_1ND})
        self.extra_tokens = nn.Parameter(torch.zeros(1, sizes["num_extra_tokens"], dim))
        norm = nn.LayerNorm(dim, sizes["norm_eps"])
        self.context_encoder = Layers(sizes, sizes["prenet_depth"], sizes["mlp_ratio"], norm)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, S, S)
        x_BND = self.local_encoder["proj"](images).flatten(2).mT + self.fixed_positional_encoder["positions"]
        x_BTD = torch.cat([self.extra_tokens.expand(len(images), -1, -1), x_BND], dim=1)  # CLS has no position
        return self.context_encoder(x_BTD)[0]


class Teacher(Layers):
    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config = json.loads(file.metadata()["config"])
        self.sizes = {**config, **config["encoder"]}
        super().__init__(self.sizes, self.sizes["depth"], self.sizes["mlp_ratio"])
        self.encoder = Encoder(self.sizes)
        self.load_state_dict(weights)
        self.requires_grad_(False)


class Student(Layers):
    """New blocks with ALiBi, on the teacher's encoder."""

    def __init__(self, sizes: dict) -> None:
        super().__init__(sizes, DEPTH, MLP_RATIO)
        self.bias_HTT = alibi(sizes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)


def alibi(sizes: dict) -> Tensor:
    """Return minus the Manhattan distance of two patches times the head's slope, (H, T, T); 0 for CLS."""
    num_heads, side = sizes["num_heads"], sizes["image_size"] // sizes["patch_size"]
    power = 2 ** int(math.log2(num_heads))  # ALiBi defines slopes for a power of two; further heads lie between them
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)][: num_heads - power]
    row_N, column_N = torch.arange(side**2) // side, torch.arange(side**2) % side
    distance_NN = (row_N[:, None] - row_N).abs() + (column_N[:, None] - column_N).abs()
    return pad(-torch.tensor(slopes)[:, None, None] * distance_NN, (sizes["num_extra_tokens"], 0) * 2)


# 3. The loss, `objectives.tokens` of a YAML: data2vec 2.0's target (section 3), and a prediction made in the same way.
def norm_mean(ffn_outputs: list[Tensor]) -> Tensor:
    """Return LayerNorm(1/L Σ_l InstanceNorm(F_l)), (B, T, D): InstanceNorm is per channel, over an image's tokens."""
    mean_BTD = torch.stack([instance_norm(ffn_BTD.mT).mT for ffn_BTD in ffn_outputs]).mean(dim=0)
    return layer_norm(mean_BTD, mean_BTD.shape[-1:])


def step(teacher: Teacher, student: Student, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return target and prediction, each (B, T, D), and the mean squared error over images, tokens and channels."""
    with torch.no_grad():
        x_BTD = teacher.encoder(images)  # once, for both
        target_BTD = norm_mean(teacher(x_BTD)[1][-teacher.sizes["average_top_k_layers"] :])
    prediction_BTD = norm_mean(student(x_BTD)[1])
    return target_BTD, prediction_BTD, mse_loss(prediction_BTD, target_BTD)


# 4. Zero-shot retrieval: an image's nearest neighbors, by cosine similarity of CLS, should have its label.
@torch.no_grad()
def retrieve(teacher: Teacher, model: nn.Module) -> str:
    """Return the top-1 and top-3 accuracies as text, for a bank of training images and for a bank of test images."""
    embedded = {}
    for split in ("train", "test"):
        loader = DataLoader(Images(split), batch_size=256)
        batches = [(model(teacher.encoder(images))[0][:, 0], labels) for images, labels in loader]
        cls_MD, labels_M = map(torch.cat, zip(*batches, strict=True))
        embedded[split] = normalize(cls_MD), labels_M
    found = []
    for bank, queries in (("train", "test"), ("test", "train")):
        (bank_MD, labels_M), (query_QD, label_Q) = embedded[bank], embedded[queries]
        is_right_Q3 = labels_M[(query_QD @ bank_MD.T).topk(3).indices] == label_Q[:, None]
        found += [f"bank {bank} top-{k} {100 * is_right_Q3[:, :k].any(dim=1).float().mean():.1f} %" for k in (1, 3)]
    return ", ".join(found)


# 5. Training: AdamW, which decays norms and biases, too; a linear warm-up and a cosine to 0.
def main() -> None:
    torch.manual_seed(17)
    teacher = Teacher(DATA / "teacher.safetensors")
    student = Student(teacher.sizes)
    print("untrained student:", retrieve(teacher, student))
    size, bicubic = teacher.sizes["image_size"], Image.Resampling.BICUBIC
    crop = transforms.RandomResizedCrop(size, (0.35, 1.0), interpolation=bicubic)  # the chapter: (0.08, 1.0)
    images = Images("train", crop, transforms.RandomHorizontalFlip(), shuffle=True)
    loader = DataLoader(images, BATCH_SIZE, drop_last=True)
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    endless = (batch for _ in range(STEPS) for batch, _ in loader)  # epoch after epoch
    for i, batch in zip(range(STEPS), endless):  # noqa: B905  (the first ends)
        *_, loss = step(teacher, student, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), max_norm=2.0)
        progress = max(0, i - WARMUP) / (STEPS - WARMUP)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, i / WARMUP) * (1 + math.cos(math.pi * progress)) / 2
        optimizer.step()
        if i % 50 == 0:
            print(f"step {i:3}, loss {loss.item():.4f}", flush=True)
    print("student:", retrieve(teacher, student))
    print("teacher:", retrieve(teacher, teacher))


if __name__ == "__main__":
    main()
