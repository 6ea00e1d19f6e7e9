"""Plan a training step for an H100 without using one: count the kernels and bytes that torch.compile plans.

A step runs on fake tensors, compiled as in training. Inductor plans each graph for CUDA, and stops before it writes
code. The bytes are those of the buffers that Inductor's own kernels read or write, each counted once per kernel; the
time is the bytes over the GPU's memory bandwidth. Clipping and the optimizer are not compiled, so not counted.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._guards import TracingContext
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map

from d2v_composer.benchmarks.step import build_model
from d2v_composer.models.encoder import Inputs
from d2v_composer.models.targets import norm_mean
from d2v_composer.objectives import compilation
from d2v_composer.report.tables import format_table

GPU = torch.device("cuda", 0)
# Properties that plans depend on.
H100 = SimpleNamespace(
    major=9,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    warp_size=32,
)
BYTES_PER_MS = 3.35e9


def benchmark(size: str = "base", batch_size: int = 256, residual: str = "full") -> dict[str, Any]:
    """Return the number of kernels and their bytes for each part of a step in bfloat16."""
    planner = Planner()
    with ExitStack() as stack:
        for name, stub in planner.stubs().items():
            stack.enter_context(patch(name, stub))
        stack.enter_context(patch.object(compilation, "_norm_mean_of_list", compilation.compiled(norm_mean)))
        stack.enter_context(inductor.patch(fx_graph_cache=False))
        stack.enter_context(planner)
        model = build_model(size)
        model.teacher.cast_weights(torch.bfloat16)
        model.teacher.encoder.half_residual = residual == "half"
        with patch("torch.cuda.is_available", lambda: True):
            compilation.compile_model(model)
        encoder = model.teacher.encoder
        inputs = encoder.noise(batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            # ALiBi's bias is kept from the first step on.
            model.teacher.block_contexts(torch.zeros(1, encoder.num_tokens(inputs.shape[1:]), encoder.config.embed_dim))
            tokens, targets = model.frozen_pass(Inputs(inputs))
            assert tokens is not None  # the student's encoder is the teacher's
            planner.part = "student, forward"
            objective = model.objectives["tokens"]
            regression = objective.regression(model.student.features(tokens), targets["tokens"])
        planner.part = "loss"
        loss = model.losses((regression,))["total"]
        planner.part = "backward"
        loss.backward()
    rows = [{"part": part, **counts} for part, counts in planner.parts.items()]
    rows.append({"part": "step", **sum(planner.parts.values(), Counter())})
    return {"size": size, "device_batch_size": batch_size, "residual": residual, "rows": rows}


def format_result(result: Mapping[str, Any]) -> str:
    """Format :func:`benchmark`'s result as a table."""
    rows = [
        [*map(str, counts), f"{size / 1e9:.2f}", f"{size / BYTES_PER_MS:.2f}"]
        for *counts, size in (row.values() for row in result["rows"])
    ]
    return format_table(["", "kernels", "Inductor's", "their GB", "ms at 3.35 TB/s"], rows)


class Planner(FakeTensorMode):
    """A torch.compile backend on fake tensors, which plans graphs and counts the ones that run.

    Attributes:
        part: The part of the step that runs.
        parts: The counts of each part.
        plan: The counts of the last graph.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        self.part = "frozen, forward"
        self.parts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.plan: Counter[str] = Counter()

    def stubs(self) -> dict[str, Any]:
        """Return the replacements, by name, that make torch.compile use this backend and compile for an H100."""
        interface = "torch._dynamo.device_interface.CudaInterface."
        properties = ("torch.cuda.", interface, f"{interface}Worker.")
        return {
            **{f"{prefix}get_device_properties": lambda *_: H100 for prefix in properties},
            f"{interface}get_compute_capability": lambda *_: 90,
            "torch.compile": partial(torch.compile, backend=self.compile),
            "torch._inductor.scheduler.has_triton": lambda: True,
            "torch._inductor.compile_fx._check_triton_bf16_support": lambda *_: None,
            "torch._inductor.graph.GraphLowering.compile_to_module": lambda graph: self.count(graph),
            "d2v_composer.models.images.PixelEncoder.is_first": False,  # a check reads numbers
            "d2v_composer.models.attention.attend": scaled_dot_product_attention,  # not in parts, as on a CPU
        }

    def compile(self, graph: GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        """Compile like Inductor, but stop once the kernels are planned."""
        TracingContext.get().fake_mode = self
        return compile_fx(graph, inputs, inner_compile=self.compile_inner)

    def compile_inner(self, graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        """Plan a graph of CPU operations for the GPU; return a function that counts and runs it."""
        on_gpu = deepcopy(graph)
        for node, original in zip(on_gpu.graph.nodes, graph.graph.nodes, strict=True):
            node.meta = {**original.meta, "val": tree_map(move, original.meta.get("val"))}
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": GPU}
        self.plan = Counter()
        try:
            compile_fx_inner(on_gpu, [move(value) for value in inputs], **options)
        except Exception:
            if not self.plan:
                raise
        plan = self.plan

        def run(*arguments: Any) -> Any:
            self.parts[self.part].update(plan)
            return graph(*arguments)

        return make_boxed_func(run)

    def count(self, graph: GraphLowering) -> None:
        """Count a graph's kernels instead of generating their code, and stop compiling the graph."""
        graph.init_wrapper_code()
        graph._update_scheduler()
        nodes = [node for node in graph.scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
        sizes = [
            node.get_read_write_buffers_sizes() for node in nodes if not isinstance(node, ExternKernelSchedulerNode)
        ]
        # Nodes without a name select one of several results.
        called = [node for node in nodes if getattr(node.node, "python_kernel_name", None)]
        self.plan.update({"kernels": len(sizes) + len(called), "own": len(sizes), "bytes": sum(sizes)})
        raise InterruptedError


def move(value: Any) -> Any:
    """Return a fake GPU tensor for a fake CPU tensor, and any other value unchanged."""
    if not isinstance(value, FakeTensor):
        return value
    with unset_fake_temporarily():
        meta = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(value.fake_mode, meta, GPU)
