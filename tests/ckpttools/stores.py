# SPDX-License-Identifier: Apache-2.0
"""A real S3 server on loopback, behind a connection that can be cut, for the tests of the mirror."""

import contextlib
import json
import logging
import socket
import threading
import urllib.request
from collections.abc import Iterator

import boto3
from moto.server import ThreadedMotoServer

USER = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "hush", "AWS_DEFAULT_REGION": "us-east-1"}


class Way:
    """A TCP relay to a server, whose connections can be cut, refused, or left without an answer."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.open = True
        self.bytes_left: int | None = None
        self.sent = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            if not self.open:
                here.close()
                continue
            there = socket.create_connection(("127.0.0.1", self._target))
            for source, sink, counted in ((here, there, True), (there, here, False)):
                threading.Thread(target=self._pump, args=(source, sink, counted), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if counted:
                    self.sent += len(data)
                    if self.bytes_left is not None:
                        self.bytes_left -= len(data)
                        if self.bytes_left < 0:
                            self.open = False
                if not self.open:
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self.open = False
        self._listener.close()


class S3:
    """moto's S3 server with one bucket."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.host, self.port = self.server.get_host_and_port()
        self.url = f"http://{self.host}:{self.port}"
        self._session = boto3.Session(USER["AWS_ACCESS_KEY_ID"], USER["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")
        self.client = self._session.client("s3", endpoint_url=self.url)
        self.client.create_bucket(Bucket="bucket")

    def add_user(self, name: str, *allowed: str) -> tuple[str, str]:
        """The key and the secret of a user who may do what is allowed, such as "s3:GetObject", and nothing else."""
        with contextlib.closing(self._session.client("iam", endpoint_url=self.url)) as users:
            users.create_user(UserName=name)
            rights = {"Effect": "Allow", "Action": allowed, "Resource": "*"}
            document = json.dumps({"Version": "2012-10-17", "Statement": [rights]})
            users.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=document)
            made = users.create_access_key(UserName=name)["AccessKey"]
        return made["AccessKeyId"], made["SecretAccessKey"]

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """While this lasts, keys, signatures and rights of users are checked."""
        self._check_after("0")
        try:
            yield
        finally:
            self._check_after("inf")

    def _check_after(self, requests: str) -> None:
        address = f"{self.url}/moto-api/reset-auth"
        request = urllib.request.Request(address, requests.encode(), {"Content-Type": "text/plain"}, method="POST")
        with urllib.request.urlopen(request):
            pass

    def objects(self, prefix: str) -> dict[str, int]:
        found = self.client.list_objects_v2(Bucket="bucket", Prefix=prefix)
        return {entry["Key"]: entry["Size"] for entry in found.get("Contents", ())}

    def truncate(self, key: str) -> None:
        body = self.client.get_object(Bucket="bucket", Key=key)["Body"].read()
        self.client.put_object(Bucket="bucket", Key=key, Body=body[: len(body) // 2])

    def stop(self) -> None:
        self.client.close()
        self.server.stop()
