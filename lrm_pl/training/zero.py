"""DeepSpeed ZeRO as a Lightning strategy, on GPUs and on CPUs.

Every rank stores a partition of the optimizer state (stage 1), of the gradients too (stage 2), and of the weights too
(stage 3). As under every other strategy, weights are float32, bf16-mixed is autocast, gradients are reduced in float32,
and inputs such as poses and rays are not cast.

This is the only module that uses DeepSpeed, which is imported on demand.
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
from lrm_pl.kernels.device import with_index
from lrm_pl.training.module import LRMModule
from lrm_pl.training.sharded_state import MOMENT_NAMES, FlatShard, StateAccess, StateTensor, full_tensor

#: Supported precisions. The others cast the weights, or scale the loss in a way that the gradient guard does not see.
PRECISIONS = ("32-true", "bf16-mixed")

Data = TypeVar("Data")


class ZeroPrecision(DeepSpeedPrecision):
    """Use autocast for bf16-mixed and do not cast the batch, as the other strategies do."""

    def convert_input(self, data: Data) -> Data:
        """Return the batch unchanged; Lightning's implementation would round cameras to bf16."""
        return data

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """Enter autocast. The engine enters it again, see ``ZeroStrategy.init_deepspeed``."""
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
        """Run backward without scaling, since Lightning has divided the loss by the number of accumulated batches."""
        model.trainer.strategy.deepspeed_engine.backward(tensor, scale_wrt_gas=False)  # type: ignore[attr-defined]

    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: Any,  # noqa: ANN401 - Lightning's signature
        model: LRMModule,
        closure: Callable[[], Any],
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Run one batch; if it completes a step, check and clip the gradient before the engine's step."""
        closure()
        engine = model.trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]
        if engine.is_gradient_accumulation_boundary():
            self._after_closure(model, optimizer)
        return engine.step()


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO with NCCL on GPUs, or with gloo on CPUs for tests.

    Args:
        stage: 1 partitions the optimizer state, 2 also gradients, 3 also weights.
        process_group_backend: Backend of the process group; null is NCCL on GPUs and gloo on CPUs.
        timeout_s: Timeout of collectives in seconds.

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
                "DeepSpeed is not installed, but this strategy needs it",
                remedy="install it with pip install 'lrm_pl[deepspeed]'",
            )
        super().__init__(
            stage=stage,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
            logging_batch_size_per_gpu=1,  # else Lightning reads it from the DataLoader
        )
        self.stage = stage

    @property
    def precision_plugin(self) -> Precision:
        """The precision plugin."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        """Replace Lightning's plugin by ``ZeroPrecision`` with the same precision.

        Raises:
            InputError: The precision is not supported.
        """
        if plugin is not None and plugin.precision not in PRECISIONS:
            raise InputError(
                expected=f"trainer.precision {' or '.join(PRECISIONS)} with DeepSpeed", found=plugin.precision
            )
        self._precision_plugin = None if plugin is None else ZeroPrecision(plugin.precision)  # type: ignore[arg-type]

    @property
    def root_device(self) -> torch.device:
        """The device of this process, with an index, which DeepSpeed requires on CPUs too."""
        return with_index(super().root_device)

    def setup_environment(self) -> None:
        """Initialize the process group, also on CPUs, which Lightning's implementation rejects."""
        if not isinstance(self.accelerator, CUDAAccelerator):
            import deepspeed
            from deepspeed.accelerator import set_accelerator
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

            set_accelerator(CPU_Accelerator())  # otherwise DeepSpeed selects a visible GPU
            # Do not compile DeepSpeed's shared-memory collectives, which takes minutes; gloo is used instead.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed calls functions in every step that torch 2.14 has renamed.
        warnings.filterwarnings(
            "ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor`", FutureWarning
        )
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Initialize the process group."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Do nothing; the engine partitions the existing network."""
        yield

    def init_deepspeed(self) -> None:
        """Create the engine for training. In evaluation, every rank stores the full network instead."""
        assert isinstance(self.lightning_module, LRMModule)
        trainer = self.lightning_module.trainer
        if not trainer.training:
            self.model_to_device()
            return
        assert isinstance(self.config, dict)
        self.config |= {
            "gradient_clipping": 0.0,  # LRMModule clips
            "bf16": {"enabled": False},  # Lightning enables it for bf16-mixed, which casts the weights
            # Otherwise the engine disables autocast on GPUs. Weights and gradients are communicated in float32.
            "torch_autocast": {
                "enabled": self.precision_plugin.precision == "bf16-mixed",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }
        if self.stage == 3:
            # Rendering uses the decoder's weights outside of a module's forward, so they are never partitioned.
            largest = max(p.numel() for p in self.lightning_module.lrm.decoder.parameters())
            zero = self.config["zero_optimization"]
            zero["stage3_param_persistence_threshold"] = max(100_000, largest)
        self._initialize_deepspeed_train(self.lightning_module)

    def state_access(self, lrm: nn.Module) -> StateAccess:
        """Return access to weights, optimizer state and gradients."""
        return ZeroStateAccess(lrm, self.deepspeed_engine.optimizer)

    def on_train_end(self) -> None:
        """Restore the full weights for use after training."""
        assert isinstance(self.lightning_module, LRMModule)
        lrm = self.lightning_module.lrm
        tensors = self.state_access(lrm).network()
        self.deepspeed_engine.destroy()  # removes its hooks from the modules
        if self.stage < 3:
            return
        for name, parameter in lrm.named_parameters():
            parameter.data = full_tensor(tensors[f"network.{name}"]).clone()


class ZeroStateAccess(StateAccess):
    """Access to the partitions of a ZeRO optimizer on this rank.

    Stages 1 and 2 flatten and concatenate the parameters of a group and partition the result; stage 3 partitions every
    parameter.
    """

    def __init__(self, lrm: nn.Module, optimizer: Any) -> None:  # noqa: ANN401 - DeepSpeed has no types
        super().__init__(lrm, optimizer)
        self.optimizer: Any = optimizer
        self._full_weights = hasattr(optimizer, "single_partition_of_fp32_groups")  # stages 1 and 2
        if self._full_weights:
            self._groups, self._flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        else:
            self._groups, self._flats = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat

    def network(self) -> dict[str, StateTensor]:
        """Return all weights and buffers by checkpoint name; trainable ones are the optimizer's float32 weights."""
        tensors: dict[str, StateTensor] = dict(network_tensors(self.lrm))
        if not self._full_weights:
            frozen: Iterator[tuple[str, Any]] = (
                (name, p) for name, p in self.lrm.named_parameters() if not p.requires_grad
            )
            tensors |= {f"network.{name}": self._stage3_shard(p, p.ds_tensor.data) for name, p in frozen}
        return tensors | {f"network.{name}": shard for name, shard in self.trainable().items()}

    def trainable(self) -> dict[str, StateTensor]:
        """Return the trainable weights by parameter name."""
        return {name: self._shard(p, flat) for name, p, flat in self._trainable_parameters()}

    def optimizer_state(self) -> dict[str, StateTensor]:
        """Return the state of AdamW by checkpoint name, initialized if it is still empty."""
        tensors: dict[str, StateTensor] = {}
        for name, parameter, flat in self._trainable_parameters():
            state = self.optimizer.optimizer.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)  # as in fused AdamW
                for moment in MOMENT_NAMES:
                    state[moment] = torch.zeros_like(flat)
            tensors[f"adam.{name}.step"] = state["step"]
            tensors |= {f"adam.{name}.{m}": self._shard(parameter, state[m]) for m in MOMENT_NAMES}
        return tensors

    def apply_changes(self) -> None:
        """Propagate in-place changes of the optimizer's weights to the network. All ranks must call this together."""
        if self._full_weights:
            self.optimizer.update_lp_params()
            return
        self.optimizer.checkpoint_event_prologue()  # releases gathered parameters
        for number in range(len(self._flats)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        self.optimizer.checkpoint_event_epilogue()  # gathers the parameters that are never partitioned

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of the full gradient, a scalar that is equal on all ranks."""
        square = torch.stack([g.float().square().sum() for g in self._gradients()]).sum()
        torch.distributed.all_reduce(square)
        return square.sqrt()

    def clip_or_skip(self, norm: Tensor, limit: float | None, skip: Tensor) -> None:
        """Clip the gradient as PyTorch does, or set it to NaN: DeepSpeed skips steps with a non-finite gradient."""
        factor = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
        torch._foreach_mul_(self._gradients(), factor.where(skip == 0, torch.nan))

    def _gradients(self) -> list[Tensor]:
        partitions = self.optimizer.averaged_gradients.values()
        return [gradient for partition in partitions for gradient in partition or ()]

    def _trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield (name, parameter, flat float32 weights of its group on this rank)."""
        flats = {id(p): flat for group, flat in zip(self._groups, self._flats, strict=True) for p in group}
        return ((name, p, flats[id(p)]) for name, p in self.lrm.named_parameters() if p.requires_grad)

    def _shard(self, parameter: Any, values: Tensor) -> FlatShard:  # noqa: ANN401 - DeepSpeed's attributes
        """Return a parameter's range in ``values``, which has the layout of its group's flat weights."""
        values = values.detach()
        if not self._full_weights:
            _, offset, count = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            return self._stage3_shard(parameter, values.narrow(0, int(offset), int(count)))
        mapping = parameter._hp_mapping
        if mapping is None:
            return FlatShard(values[:0], 0, parameter.shape)
        fragment = mapping.hp_fragment_address
        local = values.narrow(0, fragment.start, fragment.numel)
        return FlatShard(local, mapping.lp_fragment_address.start, parameter.shape)

    def _stage3_shard(self, parameter: Any, local: Tensor) -> FlatShard:  # noqa: ANN401
        """Remove the padding that makes the shards of all ranks equally long."""
        start = torch.distributed.get_rank() * parameter.ds_tensor.ds_numel
        return FlatShard(local[: max(0, parameter.ds_numel - start)], start, parameter.ds_shape)
