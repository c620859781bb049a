"""What a client learns about weights that are not its own, from vectors of its own choice.

The server's block is a public checkpoint's with a secret low-rank change of its value projection.
The client knows the checkpoint. It sends rows of one vector, over which attention is linear, and
solves for the change by least squares; the quota of vectors leaves it with too few equations. A
client that may train needs far fewer, which no useful quota prevents.

Shapes: Q = queries, D = hidden size, K = size of the value projection, R = rank of the secret.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cutlayer import ServerSettings
from cutlayer.errors import PermissionRefused
from cutlayer.settings import parse_settings
from cutlayer.wire.channel import Channel
from cutlayer.wire.codec import decode, get_codec
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.kinds import Kind
from cutlayer.wire.messages import (
    Backward,
    Decode,
    Forward,
    Hello,
    OpenRun,
    OpenSession,
    SessionOpened,
    Welcome,
)
from tests.tiny_models import tiny_model
from tests.worlds import loopback, running_server

BLOCK, D, R = 1, 32, 2
FAR = 30.0
"""Length of queries: far out, the residual stream hardly feels what the block adds to it."""


class World:
    """The public model, the secret change, and a server that runs the two together."""

    def __init__(self, folder: Path) -> None:
        _, self.public = tiny_model("llama", folder)
        generator = torch.Generator().manual_seed(5)
        values = _attention(self.public).v_proj
        shape = values.weight.shape
        self.secret_KD = 0.3 * (
            torch.randn(shape[0], R, generator=generator)
            @ torch.randn(R, shape[1], generator=generator)
        )
        with torch.no_grad():
            values.weight += self.secret_KD
            self.private = folder / "private"
            self.public.save_pretrained(self.private)
            values.weight -= self.secret_KD

    @contextmanager
    def channel(self, folder: Path, max_vectors: int | None) -> Iterator[tuple[Channel, Welcome]]:
        """A client's channel after the handshake."""
        table: dict[str, object] = {
            "model": {"path": str(self.private), "lower": BLOCK, "upper": BLOCK + 1},
            "listen": {"address": "127.0.0.1:0", "plaintext": True},
            "limits": {"max_client_vectors_per_day": max_vectors},
            "state": {"folder": str(folder / f"server-{max_vectors}")},
        }
        with running_server(parse_settings(ServerSettings, table, "test")) as server:
            model, channel = server.model, loopback(server)
            hello = Hello(nonce="00" * 32, spec=model.spec.to_table(), leaves=model.manifest.leaves)
            welcome = channel.call(Frame(Kind.HELLO, hello)).result(5).header
            assert isinstance(welcome, Welcome)
            yield channel, welcome

    def error(self, found_KD: Tensor) -> float:
        """Relative error of a guess at the secret."""
        return float((found_KD - self.secret_KD).norm() / self.secret_KD.norm())

    def attention_of(self, x_QD: Tensor, y_QD: Tensor) -> Tensor:
        """What attention added to each query, from the block's answer; the MLP is public."""
        block = self.public.model.layers[BLOCK]
        added_QD = torch.zeros_like(x_QD)
        for _ in range(20):
            stream_QD = x_QD + added_QD
            added_QD = y_QD - x_QD - block.mlp(block.post_attention_layernorm(stream_QD))
        return added_QD

    def solve(self, x_QD: Tensor, y_QD: Tensor) -> Tensor:
        """The secret by least squares over all queries; of shortest length where they are few."""
        norm = self.public.model.layers[BLOCK].input_layernorm
        rest_QD = self.attention_of(x_QD, y_QD) - norm(x_QD) @ self.linear_DD().T
        # Over directions, before the norm's weight: so few queries that span the secret suffice.
        direction_QD = norm(x_QD) / norm.weight
        change_DD = torch.linalg.lstsq(direction_QD, rest_QD, driver="gelsd").solution.T
        return torch.linalg.pinv(self.out_DK()) @ change_DD / norm.weight

    def linear_DD(self) -> Tensor:
        """Attention over one vector as the public checkpoint has it: a matrix."""
        return self.out_DK() @ _attention(self.public).v_proj.weight

    def out_DK(self) -> Tensor:
        """The output projection, summed over the heads that share a value head."""
        config = self.public.config
        shared = config.num_attention_heads // config.num_key_value_heads
        weight_DHV = _attention(self.public).o_proj.weight.reshape(
            D, config.num_key_value_heads, shared, -1
        )
        return weight_DHV.sum(2).reshape(D, -1)


def _attention(model: PreTrainedModel) -> nn.Module:
    attention: nn.Module = model.model.layers[BLOCK].self_attn
    return attention


def _send(channel: Channel, kind: Kind, header: Header, **tensors: Tensor) -> Frame:
    packed = {name: get_codec("raw").encode(x) for name, x in tensors.items()}
    return channel.call(Frame(kind, header, packed)).result(20)


def _queries_QD(count: int) -> Tensor:
    return FAR * torch.randn(count, D, generator=torch.Generator().manual_seed(9))


def _ask(channel: Channel, x_QD: Tensor) -> Tensor:
    """The block's answers to rows of one vector, a call each."""
    opened = _send(channel, Kind.OPEN_SESSION, OpenSession(max_lengths=[1], run_id=None)).header
    assert isinstance(opened, SessionOpened)
    call = Decode(session_id=opened.session_id, rows=[0], lengths=[1], positions=[0])
    answers = [_send(channel, Kind.DECODE, call, h=x_D[None]) for x_D in x_QD]
    return torch.cat([decode(answer.tensors["y"]) for answer in answers])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("extraction"))


@torch.no_grad()
def test_free_queries_give_the_secret_weights_away(world: World, tmp_path: Path) -> None:
    with world.channel(tmp_path, max_vectors=None) as (channel, _):
        x_QD = _queries_QD(2 * D)
        found_KD = world.solve(x_QD, _ask(channel, x_QD))
    assert world.error(found_KD) < 1e-2
    assert int(torch.linalg.matrix_rank(found_KD, rtol=0.05)) == R


@torch.no_grad()
def test_the_quota_of_vectors_leaves_too_few_equations(world: World, tmp_path: Path) -> None:
    quota = D // 2
    with world.channel(tmp_path, quota) as (channel, _):
        x_QD = _queries_QD(D)
        y_QD = _ask(channel, x_QD[:quota])
        with pytest.raises(PermissionRefused, match=f"{quota} vectors of today"):
            _ask(channel, x_QD[quota:])
    assert world.error(world.solve(x_QD[:quota], y_QD)) > 0.5


@torch.no_grad()
def test_each_further_vector_up_to_the_hidden_size_adds_an_equation(
    world: World, tmp_path: Path
) -> None:
    with world.channel(tmp_path, max_vectors=None) as (channel, _):
        x_QD = _queries_QD(D)
        y_QD = _ask(channel, x_QD)
    errors = [world.error(world.solve(x_QD[:q], y_QD[:q])) for q in (8, 16, 24, D)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-2] > 0.3
    assert errors[-1] < 1e-2


@torch.no_grad()
def test_a_client_that_may_train_reads_a_low_rank_secret_from_few_vectors(
    world: World, tmp_path: Path
) -> None:
    num_vectors = 3 * R + 1
    with world.channel(tmp_path, num_vectors) as (channel, _):
        # Gradients show the secret's rows, up to the direction of the query itself.
        base_D = _queries_QD(1)[0]
        rows_SD = _rows_of_secret(world, channel, base_D)
        x_SD = FAR * rows_SD * D**0.5
        y_SD = _ask(channel, x_SD)
        with pytest.raises(PermissionRefused):
            _ask(channel, x_SD[:1])
    assert num_vectors < D
    assert world.error(world.solve(x_SD, y_SD)) < 2e-2


def _rows_of_secret(world: World, channel: Channel, x_D: Tensor) -> Tensor:
    """An orthonormal base [R + 1, D] of directions outside which the secret does nothing.

    R vectors go up as FORWARD and R gradients as BACKWARD. The normed query times the norm's weight
    is what the secret multiplies, so the base is of directions before the weight.
    """
    run = OpenRun(
        run_id="run",
        adapter={"rank": 1, "alpha": 1.0},
        optimizer={"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
        clip_norm=None,
        wants_input_grad=True,
        seed=1,
        saved_steps=[0],
    )
    _send(channel, Kind.OPEN_RUN, run)
    x_RD = x_D.expand(R, D)
    forward = Forward(run_id="run", step=1, micro=0, lengths=[1] * R)
    y_RD = decode(_send(channel, Kind.FORWARD, forward, h=x_RD.contiguous()).tensors["y"])
    g_RD = torch.randn(R, D, generator=torch.Generator().manual_seed(3))
    backward = Backward(run_id="run", step=1, micro=0, is_last=True)
    grad_RD = decode(_send(channel, Kind.BACKWARD, backward, grad=g_RD).tensors["grad"])
    public_RD = _public_gradient(world, x_RD, world.attention_of(x_RD, y_RD), g_RD)
    # Scaled up: far out, a change of the query changes its direction little.
    change_RD = (grad_RD - public_RD) * FAR
    return torch.linalg.qr(torch.cat([change_RD, x_D[None]]).T).Q.T


def _public_gradient(world: World, x_RD: Tensor, added_RD: Tensor, g_RD: Tensor) -> Tensor:
    """The gradient at the query if attention were the public checkpoint's and added `added_RD`."""
    block = world.public.model.layers[BLOCK]
    with torch.enable_grad():
        query_RD = x_RD.clone().requires_grad_()
        own_RD = block.input_layernorm(query_RD) @ world.linear_DD().T
        # Its value is what was seen, its slope the public one.
        stream_RD = query_RD + own_RD + (added_RD - own_RD).detach()
        y_RD = stream_RD + block.mlp(block.post_attention_layernorm(stream_RD))
        (gradient_RD,) = torch.autograd.grad(y_RD, query_RD, g_RD)
    return gradient_RD
