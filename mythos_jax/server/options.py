"""From what a client asks for to what the engine is asked for."""

import secrets
from dataclasses import dataclass
from functools import cached_property

from mythos_jax.errors import ConfigError
from mythos_jax.model.halting import Halting
from mythos_jax.server.errors import ApiError
from mythos_jax.server.schemas import Common
from mythos_jax.server.service import Service
from mythos_jax.serving.request import MAX_STOP_TOKENS, Request

# If a request does not say: drafts have run this part of all loops, and this is their number, if there are places.
_DRAFT_PART, _DRAFT_TOKENS = 4, 3


@dataclass(frozen=True)
class Asked:
    """What the choices of a request have in common.

    source: the field that the prompt is in. stop_tokens: all that end a reply; the engine is told of the first few.
    max_new_tokens: None: as many as fit, at most `most_tokens`, if the server has no default. logprobs: how many
    alternatives; None: no log-probabilities at all.
    """

    body: Common
    source: str
    stop_tokens: tuple[int, ...]
    max_new_tokens: int | None
    most_tokens: int
    logprobs: int | None

    @cached_property
    def seed(self) -> int:
        """Of the first choice; drawn if the client gives none."""
        return secrets.randbits(32) if self.body.seed is None else self.body.seed % 2**32


def engine_request(service: Service, wanted: Asked, tokens: list[int], choice: int) -> Request:
    """For a choice of a prompt. Raises ApiError for what the model or the engine cannot do."""
    body = wanted.body
    halting, loops = _halting(service, body), _loops(service, body)
    request = Request(
        tokens=tokens,
        max_new_tokens=_new_tokens(service, wanted, tokens),
        loops=loops,
        halting=halting,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=(wanted.seed + choice) % 2**32,
        stop_tokens=wanted.stop_tokens[:MAX_STOP_TOKENS],
        logprobs=wanted.logprobs,
        **_drafts(service, body, loops),
    )
    try:
        service.engine.check(request)
    except ConfigError as error:
        raise refused(error) from None
    return request


def refused(error: ConfigError) -> ApiError:
    """Errors of the package begin with the name of what is wrong."""
    name = str(error).partition(":")[0]
    param = name.partition(" ")[0] if len(name) < 40 else None
    return ApiError(400, str(error), param=param)


def _new_tokens(service: Service, wanted: Asked, tokens: list[int]) -> int:
    limit = service.model.max_length
    most, room = wanted.max_new_tokens, limit - len(tokens)
    if room < (most or 1):
        more = "" if most is None else f" and {most} new ones"
        message = f"prompt: got {len(tokens)} tokens{more}, allowed: at most {limit}, together with the new ones"
        raise ApiError(400, message, wanted.source, "context_length_exceeded")
    return most or min(service.defaults.max_new_tokens or wanted.most_tokens, room)


def _loops(service: Service, body: Common) -> int:
    loops, most = body.loops or service.defaults.loops or service.model.loops, service.model.max_loops
    if loops > most:
        raise ApiError(400, f"loops: got {loops}, allowed: 1 to {most}", "loops")
    return loops


def _halting(service: Service, body: Common) -> Halting | None:
    halting = service.defaults.halting
    if "halting" in body.model_fields_set:
        try:
            halting = None if body.halting is None else Halting.parse(body.halting)
        except ConfigError as error:
            raise ApiError(400, str(error), "halting") from None
    bounds = {name: value for name in ("min_loops", "max_loops") if (value := getattr(body, name)) is not None}
    if bounds and halting is None:
        name = next(iter(bounds))
        raise ApiError(400, f"{name}: got {bounds[name]}, allowed only with halting", name)
    if len(bounds) == 2 and bounds["min_loops"] > bounds["max_loops"]:
        raise ApiError(400, f"min_loops: got {bounds['min_loops']}, allowed: at most max_loops", "min_loops")
    return halting.replace(**bounds) if halting is not None else None


def _drafts(service: Service, body: Common, loops: int) -> dict[str, int]:
    if not body.provisional:
        return {}
    fitting = max(1, min(_DRAFT_TOKENS, service.engine.counters.places - 1))
    return {
        "draft_loops": body.draft_loops or max(1, loops // _DRAFT_PART),
        "draft_tokens": body.draft_tokens or fitting,
    }
