"""Flat weights and checks, which code written for torch.nn's layers relies on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from fastrnn import functional
from fastrnn.capture import no_script_error
from fastrnn.cells import CELLS, Cell, State
from fastrnn.modules.arguments import as_state, permuted, rank

__all__ = ["TorchLayer"]


class TorchLayer(nn.RNNBase):
    """torch.nn's layer without its list of flat weights.

    It derives from :class:`torch.nn.RNNBase` and not from ``nn.LSTM`` and its siblings, because
    ``torch.compile`` refuses every instance of those three. The price: ``isinstance(m, nn.LSTM)``
    is False.

    Weights are read by attribute at every call, so there is no list of them to keep up to date, and
    parametrisations, ``functional_call``, tied and replaced weights need no special case.
    """

    @property
    def _cell(self) -> Cell:
        return CELLS[self.mode]

    @property
    def _name(self) -> str:
        return "RNN" if self.mode.startswith("RNN_") else self.mode

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None]) -> None:
        """Accept a list that restates the current weights, and reject any other tensor.

        Code written for torch.nn assigns the list after it has assigned the weights.
        """
        names = self._flat_weights_names
        # A parametrised weight is a new tensor each time.
        pairs = zip(names, weights, strict=False)
        if len(weights) != len(names) or any(self._parameters.get(n, w) is not w for n, w in pairs):
            raise RuntimeError(
                f"expected {self._name}'s own weights in _flat_weights, which are read by attribute"
                " at every call, got other tensors: set weight_hh_l0 and its like instead"
            )

    def _init_flat_weights(self) -> None:
        # torch's flatten_parameters asks whether cuDNN could run the mode, which it must know.
        if self.mode in ("RNN_TANH", "RNN_RELU", "LSTM", "GRU"):
            self.flatten_parameters()

    def _update_flat_weights(self) -> None:
        pass

    # torch's versions of these three maintain that list.

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle of nn.LSTM that is loaded inside `patched()` has torch's lists of weights.
        lists = ("_flat_weights", "_flat_weight_refs")
        nn.Module.__setstate__(self, {k: v for k, v in state.items() if k not in lists})

    def __prepare_scriptable__(self) -> nn.Module:
        raise no_script_error()

    # The checks of torch.nn's layers. Those without an underscore have torch's names.

    def _check_dimensions(self, input: Tensor) -> int:
        dim = rank(input, "a Tensor or a PackedSequence")
        if dim != 3 and dim != 2:
            raise ValueError(
                f"{self._name}: Expected input to be 2D or 3D, got {dim}D tensor instead"
            )
        return dim

    def _check_input(self, input: Tensor, weight: Tensor) -> None:
        if input.dtype is not weight.dtype and functional.autocast_dtype(input) is None:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: "
                f"model.to({input.dtype})"
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.shape[-1]}"
            )

    def _check_rank(self, cell: Cell, hx: Any, dim: int) -> State:
        """``hx`` as one batched tensor per state, for an input of ``dim`` dimensions."""
        state = as_state(cell, hx)
        for s in state:
            if s.dim() != dim:
                which = "batched 3-D" if dim == 3 else "unbatched 2-D"
                names = "hx" if len(state) == 1 else "hx and cx"
                got = ", ".join(f"{s.dim()}-D" for s in state)
                raise RuntimeError(
                    f"For {which} input, {names} should also be {dim}-D but got ({got}) tensors"
                )
        return state if dim == 3 else tuple(s.unsqueeze(1) for s in state)

    def _check_state(self, state: State, batch: int) -> None:
        num_states = self.num_layers * (2 if self.bidirectional else 1)
        h_size = self.proj_size or self.hidden_size
        for k, s in enumerate(state):
            expected = (num_states, batch, self.hidden_size if k else h_size)
            if s.shape != expected:
                name = "hidden" if len(state) == 1 else f"hidden[{k}]"
                raise RuntimeError(f"Expected {name} size {expected}, got {list(s.shape)}")

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        expected = 2 if batch_sizes is not None else 3
        if input.dim() != expected:
            raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
        self._check_input(input, cast(Tensor, self._flat_weights[0]))

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        num_states, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return num_states, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        _, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        self._check_state(as_state(self._cell, hidden), batch)

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        state = permuted(as_state(self._cell, hx), permutation)
        return state if len(state) > 1 else state[0]
