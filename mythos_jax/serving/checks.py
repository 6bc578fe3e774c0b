"""What a request may ask of an engine."""

from mythos_jax.runs.load import LoadedModel
from mythos_jax.serving.options import EngineOptions, Layout
from mythos_jax.serving.request import Request


def check_request(loaded: LoadedModel, layout: Layout, options: EngineOptions, request: Request) -> None:
    pass
