from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("protocol_min", "protocol_max", "memory_layout_min", "memory_layout_max", "group", "client_name", "writes")
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LAYOUT_MIN_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LAYOUT_MAX_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    WRITES_FIELD_NUMBER: _ClassVar[int]
    protocol_min: int
    protocol_max: int
    memory_layout_min: int
    memory_layout_max: int
    group: str
    client_name: str
    writes: bool
    def __init__(self, protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., memory_layout_min: _Optional[int] = ..., memory_layout_max: _Optional[int] = ..., group: _Optional[str] = ..., client_name: _Optional[str] = ..., writes: bool = ...) -> None: ...

class Arena(_message.Message):
    __slots__ = ("arena_id", "size_bytes", "writable")
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    arena_id: int
    size_bytes: int
    writable: bool
    def __init__(self, arena_id: _Optional[int] = ..., size_bytes: _Optional[int] = ..., writable: bool = ...) -> None: ...

class SessionPacket(_message.Message):
    __slots__ = ("welcome", "refusal", "arena_added", "arena_withdrawn")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ARENA_ADDED_FIELD_NUMBER: _ClassVar[int]
    ARENA_WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    refusal: Refusal
    arena_added: ArenaAdded
    arena_withdrawn: ArenaWithdrawn
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., arena_added: _Optional[_Union[ArenaAdded, _Mapping]] = ..., arena_withdrawn: _Optional[_Union[ArenaWithdrawn, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "memory_layout", "session_token", "tenant", "write_arena", "daemon_version", "trust")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WRITE_ARENA_FIELD_NUMBER: _ClassVar[int]
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    memory_layout: int
    session_token: bytes
    tenant: str
    write_arena: Arena
    daemon_version: str
    trust: str
    def __init__(self, protocol: _Optional[int] = ..., memory_layout: _Optional[int] = ..., session_token: _Optional[bytes] = ..., tenant: _Optional[str] = ..., write_arena: _Optional[_Union[Arena, _Mapping]] = ..., daemon_version: _Optional[str] = ..., trust: _Optional[str] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ArenaAdded(_message.Message):
    __slots__ = ("arena",)
    ARENA_FIELD_NUMBER: _ClassVar[int]
    arena: Arena
    def __init__(self, arena: _Optional[_Union[Arena, _Mapping]] = ...) -> None: ...

class ArenaWithdrawn(_message.Message):
    __slots__ = ("arena_id",)
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    arena_id: int
    def __init__(self, arena_id: _Optional[int] = ...) -> None: ...

class ClientPacket(_message.Message):
    __slots__ = ("arena_returned",)
    ARENA_RETURNED_FIELD_NUMBER: _ClassVar[int]
    arena_returned: ArenaReturned
    def __init__(self, arena_returned: _Optional[_Union[ArenaReturned, _Mapping]] = ...) -> None: ...

class ArenaReturned(_message.Message):
    __slots__ = ("arena_id",)
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    arena_id: int
    def __init__(self, arena_id: _Optional[int] = ...) -> None: ...
