"""Who takes part, one file each: every contender converts the same digital model and brings its own optimizer."""

from __future__ import annotations

from bench.peers.base import Peer
from bench.peers.compiled import Compiled
from bench.peers.digital import Digital
from bench.peers.ibm_aihwkit import Aihwkit
from bench.peers.lightning import Lightning
from bench.peers.lightning_triton import LightningTriton
from bench.peers.ours import Ours

PEERS: tuple[Peer, ...] = (Ours(), Digital(), Lightning(), LightningTriton(), Aihwkit(), Compiled())
"""In the order in which they take turns and are listed."""
