"""One decoder layer, operation by operation, as transformers 5 and PEFT run it.

Each part writes a module's forward onto a :class:`~launcher.autograd_tape.Tape`: what it reads,
makes and saves. Sizes are bytes per token or per token pair.

Source:
    transformers 5.23 ``models/<type>/modeling_<type>.py`` and ``integrations/moe.py``.
"""

from __future__ import annotations

from launcher.predict.attention_parts import AttentionParts
from launcher.predict.autograd_tape import NOTHING, Extra, Size, Tape, Weight
from launcher.predict.layer_parts import LayerSetting

MLP_OUTPUTS = frozenset({"down_proj", "fc2", "dense_4h_to_h"})


def write_layer(setting: LayerSetting) -> Tape:
    """Return the tape of one decoder layer; its first value is the layer's input."""
    return _Writer(setting).write()


def write_final_norm(setting: LayerSetting) -> Tape:
    """Return the tape of the norm after the last layer; its first value is its input."""
    writer = _Writer(setting)
    size = writer.per_token(setting.model.hidden_size)
    writer.norm(writer.tape.value(size, is_outside=True))
    return writer.tape


class _Writer(AttentionParts):
    """Writes one whole layer onto one tape."""

    def write(self) -> Tape:
        model = self.model
        hidden = self.tape.value(self.per_token(model.hidden_size), is_outside=True)
        if model.has_parallel_residual:
            self._parallel(hidden)
        else:
            self._sequential(hidden)
        return self.tape

    def _sequential(self, hidden: int) -> None:
        has_output_norms = self.model.num_norms_per_layer == 4
        for block in (self.attention, self._mlp):
            branch = block(self.norm(hidden))
            if has_output_norms:
                branch = self.norm(branch)
            hidden = self.add(hidden, branch)

    def _parallel(self, hidden: int) -> None:
        normed = self.norm(hidden)
        second = self.norm(hidden) if self.model.num_norms_per_layer > 1 else normed
        attended = self.attention(normed)
        passed = self._mlp(second)
        self.add(self.add(attended, passed), hidden)

    def _mlp(self, value: int) -> int:
        if self.setting.is_moe:
            return self._experts(value)
        inputs = [w for w in self.mlp_linears if w.module not in MLP_OUTPUTS]
        (output,) = [w for w in self.mlp_linears if w.module in MLP_OUTPUTS]
        if self.model.mlp == "plain":
            return self.linear(self._activate(self.linear(value, inputs[0])), output)
        width = self.model.intermediate_size
        if len(inputs) == 1:
            return self.linear(self._gate_packed(self.linear(value, inputs[0]), width), output)
        gate = self.linear(value, inputs[0])
        if self.setting.has_liger:
            # liger_kernel/ops/swiglu.py saves gate and up and writes their gradients over them.
            up = self.linear(value, inputs[1])
            product = self.tape.record(
                "SwiGLU", (gate, up), self.per_token(width), saves=(gate, up), gradient="saved"
            )
            self.tape.hold((value,))  # the argument of the MLP's forward
            return self.linear(product, output)
        active = self._activate(gate)
        up = self.linear(value, inputs[1])
        product = self.tape.record(
            "gate product", (active, up), self.per_token(width), saves=(active, up)
        )
        self.tape.hold((value,))  # the argument of the MLP's forward
        return self.linear(product, output)

    def _activate(self, value: int, *, size: Size | None = None, saved: int | None = None) -> int:
        size = self.tape.size(value) if size is None else size
        saves = value if saved is None else saved
        if self.model.activation in {"gelu_new", "gelu_fast"}:
            # transformers/activations.py:NewGELUActivation in Python: also keeps 0.5 * x,
            # tanh and 1 + tanh.
            return self.tape.record(
                "activation", (value,), size, saves=(saves,),
                extra=Extra(saved=size * 3, backward=size),
            )  # fmt: skip
        return self.tape.record("activation", (value,), size, saves=(saves,))

    def _gate_packed(self, packed: int, width: float) -> int:
        """Write ``act(gate) * up`` where both are halves of one tensor."""
        part = self.per_token(width)
        # One split: its backward joins both halves' gradients, so up's waits for gate's.
        up = self.tape.record("up half", (), NOTHING, gradient=part)
        gate = self.tape.record("gate half", (packed,), NOTHING, gradient=part)
        active = self._activate(gate, size=part, saved=packed)
        return self.tape.record("gate product", (active, up), part, saves=(active, packed))

    def _experts(self, value: int) -> int:
        """Write router and routed experts through grouped matrix products."""
        model, tape = self.model, self.tape
        routed, width = model.num_experts_per_token, model.moe_intermediate_size
        experts = {w.name: w for w in model.weights if w.role == "expert"}
        is_trained = not self.setting.is_frozen
        sizes = [w.num_elements if is_trained else 0 for w in experts.values()]
        router = Size(token=4 * model.num_experts + 16 * routed)
        tape.record("router", (), NOTHING, saves=(value,), extra=Extra(saved=router))
        hidden = self.per_token(routed * model.hidden_size)
        gathered = tape.record("route tokens", (value,), hidden)
        packed = tape.record(
            "expert gate_up", (gathered,), self.per_token(2 * routed * width),
            saves=(gathered,) if is_trained else (), weight=Weight(gradient_elements=sizes[0]),
        )  # fmt: skip
        product = self._gate_packed(packed, routed * width)
        lowered = tape.record(
            "expert down", (product,), hidden,
            saves=(product,) if is_trained else (), weight=Weight(gradient_elements=sizes[1]),
        )  # fmt: skip
        # Mixtral's routing weights are fp32 (softmax in fp32, never cast back).
        is_fp32 = model.model_type == "mixtral"
        scaled = self.per_token(routed * model.hidden_size, 4) if is_fp32 else hidden
        weighted = tape.record(
            "routing weights", (lowered,), scaled, saves=(lowered,),
            extra=Extra(backward=scaled),
        )  # fmt: skip
        ordered = tape.record("restore order", (weighted,), scaled)
        return tape.record("sum experts", (ordered,), self.per_token(model.hidden_size))
