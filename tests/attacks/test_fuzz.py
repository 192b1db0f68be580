"""A short run of `make fuzz`, with another seed."""

from __future__ import annotations

from fuzz import Fuzzer


def test_changed_packets_end_in_a_typed_error_or_are_what_was_signed() -> None:
    """2,000 packets; what is asserted of each stands in `Fuzzer`."""
    fuzzer = Fuzzer(seed=1)
    fuzzer.run(2000)
    assert sum(fuzzer.outcomes.values()) > 1900
    # it reaches every kind of end, so it tests more than the first gate
    assert {
        "InputError",
        "LimitError",
        "TrustError",
        "applicable",
        "verified Revocation",
        "verified Rotation",
    } <= set(fuzzer.outcomes)
    assert {"verified, then InputError", "verified, then NotForThisDevice"} <= set(fuzzer.outcomes)
    assert len(fuzzer.corpus) > fuzzer.seeds + 20
