"""DeepSpeed ZeRO under Lightning, on GPUs and on CPUs, without what either does to numbers behind one's back.

Every rank holds a part of the optimizer's state (stage 1), of the gradients too (2), and of the weights too (3). The
weights stay float32: bf16-mixed is autocast as under every other strategy, gradients are summed in float32, and no
input is cast, so poses and rays stay what they are.

Only this file knows DeepSpeed; it is imported when a run asks for it.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from lrm_pl.checkpoints import network_tensors
from lrm_pl.errors import InputError
from lrm_pl.kernels.device import indexed
from lrm_pl.training.module import LRMModule
from lrm_pl.training.parallelize import Part, whole
from lrm_pl.training.sharded_state import Holder
from lrm_pl.training.state import MOMENTS, Held

#: What can be trained in; the others would cast weights, or scale losses out of the gradient guard's sight.
PRECISIONS = ("32-true", "bf16-mixed")

Data = TypeVar("Data")


class ZeroPrecision(DeepSpeedPrecision):
    """Leave the batch alone, and let autocast choose what is computed in bf16, as every other strategy does."""

    def convert_input(self, data: Data) -> Data:
        """Return the batch as it is; Lightning's own would round cameras to bf16."""
        return data

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """Enter autocast; the engine enters it again, see ``ZeroStrategy``."""
        if self.precision == "32-true":
            return contextlib.nullcontext()
        from deepspeed.accelerator import get_accelerator

        return torch.autocast(get_accelerator().device_name(), torch.bfloat16)

    def backward(  # type: ignore[override]
        self,
        tensor: Tensor,
        model: LRMModule,
        optimizer: Any,  # noqa: ANN401 - Lightning's signature
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Run backward; Lightning has divided the loss by the accumulated batches already."""
        model.trainer.strategy.deepspeed_engine.backward(tensor, scale_wrt_gas=False)  # type: ignore[attr-defined]

    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: Any,  # noqa: ANN401 - Lightning's signature
        model: LRMModule,
        closure: Callable[[], Any],
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Run one batch; where it completes a step, judge and clip the gradient, then let the engine step."""
        closure()
        engine = model.trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]
        if engine.is_gradient_accumulation_boundary():
            self._after_closure(model, optimizer)
        return engine.step()


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO on NCCL, or on gloo to be tried out on CPUs.

    Args:
        stage: 1 cuts the optimizer's state, 2 gradients too, 3 weights too.
        process_group_backend: NCCL on GPUs, gloo on CPUs unless said otherwise.
        timeout_s: Seconds until a rank that does not answer ends the run.

    Raises:
        InputError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        process_group_backend: str | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError(
                expected="DeepSpeed for this strategy",
                found="none",
                remedy="install the extra: pip install 'lrm_pl[deepspeed]'",
            )
        super().__init__(
            stage=stage,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
            logging_batch_size_per_gpu=1,  # of its own throughput log; it would look for one in our loader
        )
        self.stage = stage

    @property
    def precision_plugin(self) -> Precision:
        """What computes in which precision."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        """Take our own instead of the one that Lightning chose; its precision stays.

        Raises:
            InputError: A precision that is not trained in.
        """
        if plugin is not None and plugin.precision not in PRECISIONS:
            raise InputError(
                expected=f"trainer.precision {' or '.join(PRECISIONS)} with DeepSpeed", found=plugin.precision
            )
        self._precision_plugin = None if plugin is None else ZeroPrecision(plugin.precision)  # type: ignore[arg-type]

    @property
    def root_device(self) -> torch.device:
        """This process's device; DeepSpeed wants an index on a CPU too."""
        return indexed(super().root_device)

    def setup_environment(self) -> None:
        """Start the process group; on a CPU too, which Lightning's own refuses."""
        if not isinstance(self.accelerator, CUDAAccelerator):
            import deepspeed
            from deepspeed.accelerator import set_accelerator
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

            set_accelerator(CPU_Accelerator())  # DeepSpeed would take a GPU where it sees one
            # Shared-memory sums, which it would compile now, for a minute and more; gloo's do.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed's own use, at every step, of names that torch 2.14 renamed.
        warnings.filterwarnings(
            "ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor`", FutureWarning
        )
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Start the process group."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Do nothing: the network is there already, and is cut when the engine is made."""
        yield

    def init_deepspeed(self) -> None:
        """Make the engine for training; to measure, every rank holds the whole network."""
        assert isinstance(self.lightning_module, LRMModule)
        trainer = self.lightning_module.trainer
        if not trainer.training:
            self.model_to_device()
            return
        assert isinstance(self.config, dict)
        self.config |= {
            "gradient_clipping": 0.0,  # the LightningModule's, as under every strategy
            "bf16": {"enabled": False},  # Lightning's choice for bf16-mixed: weights in bf16
            # Without this the engine would leave autocast on GPUs. No module has its weights or gradients sent in bf16.
            "torch_autocast": {
                "enabled": self.precision_plugin.precision == "bf16-mixed",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }
        if self.stage == 3:
            # Rendering reads the decoder's weights outside a module's forward: they stay whole between steps.
            largest = max(p.numel() for p in self.lightning_module.lrm.decoder.parameters())
            zero = self.config["zero_optimization"]
            zero["stage3_param_persistence_threshold"] = max(100_000, largest)
        self._initialize_deepspeed_train(self.lightning_module)

    def make_holder(self, lrm: nn.Module) -> Holder:
        """Say how weights, moments and gradients are reached."""
        return ZeroHolder(lrm, self.deepspeed_engine.optimizer)

    def on_train_end(self) -> None:
        """Make the weights whole again, for what comes after training."""
        assert isinstance(self.lightning_module, LRMModule)
        lrm = self.lightning_module.lrm
        held = self.make_holder(lrm).network()
        self.deepspeed_engine.destroy()  # takes its hooks off the modules
        if self.stage < 3:
            return
        for name, parameter in lrm.named_parameters():
            parameter.data = whole(held[f"network.{name}"]).clone()


class ZeroHolder(Holder):
    """Weights, moments and gradients of a ZeRO optimizer, each rank's parts of them.

    Stages 1 and 2 lay the parameters of a group end to end and cut that in equal parts; stage 3 cuts every parameter.
    """

    def __init__(self, lrm: nn.Module, optimizer: Any) -> None:  # noqa: ANN401 - DeepSpeed has no types
        super().__init__(lrm, optimizer)
        self.optimizer: Any = optimizer
        self._whole_weights = hasattr(optimizer, "single_partition_of_fp32_groups")  # stages 1 and 2
        if self._whole_weights:
            self._groups, self._flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        else:
            self._groups, self._flats = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat

    def network(self) -> dict[str, Held]:
        """Name the weights: the float32 ones that the optimizer moves, and what is not trained."""
        held: dict[str, Held] = dict(network_tensors(self.lrm))
        if not self._whole_weights:
            frozen: Iterator[tuple[str, Any]] = (
                (name, p) for name, p in self.lrm.named_parameters() if not p.requires_grad
            )
            held |= {f"network.{name}": self._stage3_part(p, p.ds_tensor.data) for name, p in frozen}
        return held | {f"network.{name}": part for name, part in self.trained().items()}

    def trained(self) -> dict[str, Held]:
        """Name the trained weights."""
        return {name: self._part(p, flat, flat) for name, p, flat in self._trained()}

    def moments(self) -> dict[str, Held]:
        """Name AdamW's state, made where it has made none yet."""
        held: dict[str, Held] = {}
        for name, parameter, flat in self._trained():
            state = self.optimizer.optimizer.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)  # as fused AdamW's
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(flat)
            held[f"adam.{name}.step"] = state["step"]
            held |= {f"adam.{name}.{m}": self._part(parameter, flat, state[m]) for m in MOMENTS}
        return held

    def changed(self) -> None:
        """Make the network compute with the weights that were written; all ranks call this."""
        if self._whole_weights:
            self.optimizer.update_lp_params()
            return
        self.optimizer.checkpoint_event_prologue()  # lets go of what is gathered
        for number in range(len(self._flats)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        self.optimizer.checkpoint_event_epilogue()  # gathers what stays gathered between steps

    def gradient_norm(self) -> Tensor:
        """Measure the 2-norm over all ranks' parts of the gradient."""
        square = torch.stack([g.float().square().sum() for g in self._gradients()]).sum()
        torch.distributed.all_reduce(square)
        return square.sqrt()

    def clip_or_skip(self, norm: Tensor, limit: float | None, skip: Tensor) -> None:
        """Clip with PyTorch's formula, or make it NaN: DeepSpeed takes no step with a gradient that is not finite."""
        factor = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
        torch._foreach_mul_(self._gradients(), factor.where(skip == 0, torch.nan))

    def _gradients(self) -> list[Tensor]:
        parts = self.optimizer.averaged_gradients.values()
        return [gradient for part in parts for gradient in part or ()]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Name the trained parameters, each with the flat float32 tensor that holds this rank's part of its group."""
        flats = {id(p): flat for group, flat in zip(self._groups, self._flats, strict=True) for p in group}
        return ((name, p, flats[id(p)]) for name, p in self.lrm.named_parameters() if p.requires_grad)

    def _part(self, parameter: Any, flat: Tensor, values: Tensor) -> Part:  # noqa: ANN401 - DeepSpeed's attributes
        """Find a parameter's part in ``values``, which are laid out like the flat weights of its group."""
        values = values.detach()
        if not self._whole_weights:
            _, offset, count = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            return self._stage3_part(parameter, values.narrow(0, int(offset), int(count)))
        mapping = parameter._hp_mapping
        if mapping is None:
            return Part(values[:0], 0, parameter.shape)
        place = mapping.hp_fragment_address
        local = values.narrow(0, place.start, place.numel)
        return Part(local, mapping.lp_fragment_address.start, parameter.shape)

    def _stage3_part(self, parameter: Any, local: Tensor) -> Part:  # noqa: ANN401
        """Cut off the padding that makes all ranks' parts of a parameter as long."""
        start = torch.distributed.get_rank() * parameter.ds_tensor.ds_numel
        return Part(local[: max(0, parameter.ds_numel - start)], start, parameter.ds_shape)
