"""Admission of requests: bounded places and prompt tokens, reserved before any work is done for a request."""

import asyncio
from dataclasses import dataclass

from dspark_server.errors import CapacityError, RequestError
from dspark_server.words import counted

SHUTTING_DOWN = "The server is shutting down; send the request to another replica."


@dataclass(eq=False)
class Reservation:
    """A reservation for `places` submissions; a context manager that returns unused places.

    `tokens`: estimated length of their prompts.
    """

    admission: "Admission"
    places: int
    tokens: int = 0

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *exc: object) -> None:
        self.admission.release(self.places, self.tokens)
        self.places = self.tokens = 0


class Admission:
    """Bounds, on the event loop, choices in flight (`places`) and prompt tokens without an answer (`tokens`)."""

    def __init__(self, places: int, tokens: int) -> None:
        self._places = places
        self._tokens = tokens
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0
        self.queued_tokens = 0
        self.draining = False  # no new requests
        self.closed = False  # the drain is over: reserved places are refused too

    def reserve(self, choices: int, tokens: int) -> Reservation:
        """Take places. Raises CapacityError if there are none now, RequestError if there never will be."""
        if self.draining:
            raise CapacityError(SHUTTING_DOWN, retry_after=5)
        if choices > self._places:
            raise RequestError(
                f"The request asks for {choices} choices over all its prompts, and this server holds {self._places}.",
                param="n",
            )
        if self.in_flight + choices > self._places:
            raise CapacityError(
                f"The queue is full ({counted(self.in_flight, 'request')} in flight, {self._places} allowed). "
                "Try again later."
            )
        # A prompt longer than the bound is admitted when no other waits; else it never would be.
        if self.queued_tokens and self.queued_tokens + tokens > self._tokens:
            raise CapacityError(
                f"The queue is full ({self.queued_tokens} prompt tokens waiting, {self._tokens} allowed). "
                "Try again later."
            )
        self.in_flight += choices
        self.queued_tokens += tokens
        self._idle.clear()
        return Reservation(self, choices, tokens)

    def enter(self, reservation: Reservation, tokens: int) -> None:
        """Use a reserved place, until its release, for a choice whose prompt has `tokens` tokens.
        Raises CapacityError if the drain has ended meanwhile.
        """
        if self.closed:
            raise CapacityError(SHUTTING_DOWN, retry_after=5)
        assert reservation.places > 0, "more submissions than reserved places"
        reservation.places -= 1
        self.queued_tokens += tokens

    def release(self, places: int, tokens: int) -> None:
        """Return places, or prompt tokens that no longer wait."""
        self.in_flight -= places
        self.queued_tokens -= tokens
        if self.in_flight == 0:
            self._idle.set()

    async def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is in flight, at most `timeout` seconds; False if something still is."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True
