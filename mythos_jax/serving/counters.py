"""What an engine has done, in plain numbers."""

from dataclasses import dataclass


@dataclass
class Counters:
    """Any thread may read them.

    steps: of all places together; chunks: of prompts. loops: run by places, those of drafts that were taken back
    included; prompt_loops: by tokens of prompts. tokens: new ones, final; token_loops: spent on them; full_loops: what
    they would have taken without halting. prompt_tokens: read; cached_tokens: of prompts, not read because the prefix
    cache had them. drafted, accepted: tokens that were shown as drafts, and those of them that became final.
    requests_started, requests_finished; compiled: programs.
    Now: places, and how many of them are occupied; queued: requests that wait; pages, and how many of them are in use.
    """

    steps: int = 0
    chunks: int = 0
    loops: int = 0
    prompt_loops: int = 0
    tokens: int = 0
    token_loops: int = 0
    full_loops: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    requests_started: int = 0
    requests_finished: int = 0
    compiled: int = 0
    places: int = 0
    occupied: int = 0
    queued: int = 0
    pages: int = 0
    pages_used: int = 0
