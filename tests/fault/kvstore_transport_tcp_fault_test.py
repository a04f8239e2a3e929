"""The TCP data path when the peer dies, freezes, restarts, or is hostile: an error in time, and nothing left."""

from kvstore.testing.transport_faults import TransportFaultContract
from kvstore.transport import Transport
from kvstore.transport.tcp import TcpTransport


class TestTcpFaults(TransportFaultContract):
    factory = "kvstore.testing.transport_faults:tcp_holder"

    def make_client(self, address: bytes) -> Transport:
        return TcpTransport(address, peer="holder")
