"""The numbers of the frame kinds. What each carries is in `messages`."""

from enum import IntEnum

__all__ = ["Kind"]


class Kind(IntEnum):
    """Frame kinds; the numbers are part of the wire format."""

    HELLO = 1
    WELCOME = 2
    FAILED = 3
    OPEN_RUN = 10
    RUN_OPENED = 11
    FORWARD = 12
    FORWARD_DONE = 13
    BACKWARD = 14
    BACKWARD_DONE = 15
    COMMIT = 16
    COMMITTED = 17
    PULL_ADAPTER = 18
    TRUNK_ADAPTER = 19
    OPEN_SESSION = 30
    SESSION_OPENED = 31
    DECODE = 32
    DECODED = 33
    CLOSE_SESSION = 34
    CLOSED = 35
    JOIN = 40
    JOINED = 41
    ENTER_ROUND = 42
    ROUND = 43
    SHARE_KEYS = 44
    PEER_KEYS = 45
    SHARE_SECRETS = 46
    PEER_SECRETS = 47
    SEND_UPDATE = 48
    UPDATE_TAKEN = 49
    UNMASK = 50
    UNMASKED = 51
    LEAVE = 52
    LEFT = 53
    PUBLISH = 54
    PUBLISHED = 55
    WAIT = 56
    ADOPT = 57
    ADOPTED = 58
    DESCRIBE = 60
    TAKE_STATS = 61
    STATS = 62
    ADAPTER_LAYOUT = 63
    LAYOUT = 64
    BEGIN_ROUND = 65
    ROUND_BEGUN = 66
    COLLECT = 67
    COLLECTED = 68
    END_ROUND = 69
    ROUND_ENDED = 70
    CHALLENGE = 72
    EVIDENCE = 73
    KEY_REQUEST = 74
    KEY = 75
    ASK_ROWS = 80
    ROWS_MISSING = 81
    PUT_ROWS = 82
    ROWS_PUT = 83
    SCORE_ROWS = 84
    ROWS_SCORED = 85
    LEARN_LOGITS = 86
    LOGITS_LEARNT = 87
    DECODE_LOGITS = 88
    LOGITS = 89
    RECUT = 90
    RECUT_DONE = 91
