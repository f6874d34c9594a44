#!/usr/bin/env python3
"""Makes the pinned vectors from docs/protocol.md alone, sharing no code with stiefel.

Needs the Python package `cryptography`. Run it in this folder: it writes keys.txt, datagrams.txt and session.txt.
A change of these files is a change of the protocol: it needs a new version number.
"""

import hashlib
import hmac
import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.cmac import CMAC
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

VERSION = 1
SECRET = bytes(range(32))
CONTROL = bytes(range(0x20, 0x40))
SESSION = bytes(range(0xE0, 0xF0))


def counting(first, length=16):
    return bytes((first + i) & 0xFF for i in range(length))


def hkdf(secret, label):
    prk = hmac.digest(b"stiefel 1", secret, "sha256")
    return hmac.digest(prk, label + b"\x01", "sha256")


def eax(key, nonce, header, plain):
    def omac(number, data):
        mac = CMAC(algorithms.AES(key))
        mac.update(bytes(15) + bytes([number]) + data)
        return mac.finalize()

    n, h = omac(0, nonce), omac(1, header)
    encrypt = Cipher(algorithms.AES(key), modes.CTR(n)).encryptor()
    cipher = encrypt.update(plain) + encrypt.finalize()
    tag = bytes(a ^ b ^ c for a, b, c in zip(n, h, omac(2, cipher)))
    return nonce + cipher + tag


class Noise:
    """Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s, both sides at once."""

    def __init__(self, prologue, psk):
        name = b"Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s"
        self.h = self.ck = hashlib.blake2s(name).digest()
        self.mix_hash(prologue)
        first, second, self.k = self.hkdf(psk, 3)
        self.ck, self.n = first, 0
        self.mix_hash(second)

    def hkdf(self, data, count):
        def mac(key, message):
            return hmac.digest(key, message, "blake2s")

        prk, out, last = mac(self.ck, data), [], b""
        for i in range(count):
            last = mac(prk, last + bytes([i + 1]))
            out.append(last)
        return out

    def mix_hash(self, data):
        self.h = hashlib.blake2s(self.h + data).digest()

    def mix_key(self, data):
        self.ck, self.k = self.hkdf(data, 2)
        self.n = 0

    def encrypt_and_hash(self, plain):
        sealed = seal(self.k, self.n, self.h, plain)
        self.n += 1
        self.mix_hash(sealed)
        return sealed

    def ephemeral(self, public):
        self.mix_hash(public)
        self.mix_key(public)


def seal(key, n, header, plain):
    return ChaCha20Poly1305(key).encrypt(bytes(4) + n.to_bytes(8, "little"), plain, header)


def public(private):
    return private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def write(name, entries):
    lines = ["# Made by make.py; docs/protocol.md says what they are."]
    lines += [f"{key} = {value if isinstance(value, str) else value.hex()}" for key, value in entries.items()]
    Path(name).write_text("\n".join(lines) + "\n")


def keys():
    write("keys.txt", {
        "secret": SECRET,
        "desktop_datagrams": hkdf(SECRET, b"datagrams desktop to laptop"),
        "laptop_datagrams": hkdf(SECRET, b"datagrams laptop to desktop"),
        "handshake": hkdf(SECRET, b"session handshake"),
        "activation": hkdf(SECRET, b"activation " + counting(0xA0)),
    })


def datagrams():
    desktop = hkdf(SECRET, b"datagrams desktop to laptop")
    laptop = hkdf(SECRET, b"datagrams laptop to desktop")

    def datagram(key, kind, nonce, body):
        header = b"stfl" + bytes([VERSION, kind])
        return header + eax(key, counting(nonce), header, body.ljust(128, b"\0"))

    ticket = hkdf(SECRET, b"ticket")
    name = "täst-laptop".encode()
    offer = counting(0xA0) + counting(0xB0) + b"\x02" + (61570).to_bytes(2, "big") + (30).to_bytes(2, "big")
    lending = offer.replace(b"\x02" + (61570).to_bytes(2, "big"), b"\x03" + (61570).to_bytes(2, "big"), 1)
    locked = offer.replace(b"\x02" + (61570).to_bytes(2, "big"), b"\x04" + (61570).to_bytes(2, "big"), 1)
    write("datagrams.txt", {
        "discover": datagram(desktop, 1, 0x10, counting(0xA0)),
        "offer": datagram(laptop, 2, 0x20, offer + bytes([len(name)]) + name),
        "lending": datagram(laptop, 2, 0x50, lending + bytes([len(name)]) + name),
        "locked": datagram(laptop, 2, 0x70, locked + bytes([len(name)]) + name),
        "wake": datagram(desktop, 3, 0x30, counting(0xB0) + counting(0xC0)),
        "waking": datagram(laptop, 4, 0x40, counting(0xC0) + (30).to_bytes(2, "big")),
        "ticket": datagram(ticket, 9, 0x60, counting(0xA0) + (1_800_000_000).to_bytes(8, "big")),
        "unlocking_ticket": datagram(ticket, 10, 0x80, counting(0xA0) + (1_800_000_000).to_bytes(8, "big")),
    })


def session():
    offer, machine = counting(0xB0), counting(0xD0)
    ours, theirs = (X25519PrivateKey.from_private_bytes(counting(first, 32)) for first in (0x40, 0x60))
    noise = Noise(b"stiefel session" + bytes([VERSION]) + offer, hkdf(SECRET, b"session handshake"))
    # -> psk, e
    noise.ephemeral(public(ours))
    opening = bytes([VERSION]) + offer + public(ours) + noise.encrypt_and_hash(machine)
    # <- e, ee
    noise.ephemeral(public(theirs))
    noise.mix_key(ours.exchange(X25519PublicKey.from_public_bytes(public(theirs))))
    opened = public(theirs) + noise.encrypt_and_hash(SESSION)
    to_laptop, to_desktop = noise.hkdf(b"", 2)

    manifest = {
        "hostname": "laptop",
        "payload": {"version": "6.1.0", "cmdline": "root=UUID=1 ro",
                    "parts": [{"part": "kernel", "size": 3}, {"part": "initrd", "size": 0},
                              {"part": "overlay", "size": 2}],
                    "boot": [{"path": "/boot", "partition": 2, "fstype": "ext4", "fingerprint": "0a" * 32}]},
        "disk": {"identity": {"gpt_guid": None, "wwid": None, "serial": "S1", "model": None, "size": 4096},
                 "logical_block_size": 512,
                 "transport": {"kind": "nbd", "port": 10809, "export": "x"}},
        "link": {"mode": "dedicated", "address": "::1", "laptop": "::1", "grace": 900},
        "claims": [{"name": "sda1", "claims": [{"kind": "fs-uuid", "value": "0ABC-12EF"}]}],
        "control": CONTROL.hex(),
        "session": SESSION.hex(),
    }
    manifest = json.dumps(manifest, separators=(",", ":")).encode()
    frames = [b"\x02", b"\x04" + manifest, b"\x05abc", b"\x05de", b"\x06"]
    names = ["waiting", "manifest", "data1", "data2", "end"]

    def frame(number, plain):
        sealed = seal(to_desktop, number, b"", plain)
        return len(sealed).to_bytes(2, "big") + sealed

    def control(kind, nonce, label, plain):
        header = b"stfl" + bytes([VERSION, kind]) + SESSION
        return eax(hkdf(CONTROL, label), counting(nonce), header, plain)

    write("session.txt", {
        "opening": opening,
        "opened": opened,
        "begin": seal(to_laptop, 0, b"", b"\x01"),
        "ask_list": seal(to_laptop, 0, b"", b"\x01") + seal(to_laptop, 1, b"", b'{"ask":"list"}'),
        "loan_none": frame(0, b'\x07{"loan":"disks","disks":[]}'),
        "unlock": seal(to_laptop, 0, b"", b"\x01")
        + seal(to_laptop, 1, b"", (6).to_bytes(2, "big") + "pässt".encode() + bytes(250)),
        "unlock_wrong": frame(0, b"\x08\x01\x00\x00" + "sda2".encode()),
        "manifest_json": manifest.decode(),
        **{name: frame(number, plain) for number, (name, plain) in enumerate(zip(names, frames))},
        "refusal": frame(0, b"\x03" + "zu spät".encode()),
        "goodbye_poweroff": control(5, 0x50, b"goodbye desktop to laptop", counting(0x70) + b"\x01"),
        "goodbye_reboot": control(5, 0x51, b"goodbye desktop to laptop", counting(0x70) + b"\x02"),
        "goodbye_reboot_anew": control(5, 0x52, b"goodbye desktop to laptop", counting(0x70) + b"\x03"),
        "answer_done": control(6, 0x60, b"goodbye laptop to desktop", counting(0x70) + b"\x00"),
        "beat": control(7, 0x80, b"pulse desktop to laptop", (5).to_bytes(8, "big") + counting(0x70) + b"\x05\x8c" + bytes(6)),
        "sign": control(8, 0x81, b"pulse laptop to desktop", counting(0x70) + b"\x02\x2a\x23\x28" + bytes(12)),
        "answer_refused": control(6, 0x61, b"goodbye laptop to desktop", counting(0x70) + b"\x01disk full"),
    })


keys()
datagrams()
session()
