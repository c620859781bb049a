#!/bin/sh
# UNTESTED. First process of the enclave: a bridge for the one port, then the server as user 10001.
# The settings and the certificates lie in the image; the server's private key comes sealed, or is
# made inside and certified through the evidence that its attested certificate carries.
set -eu
ip link set lo up
socat VSOCK-LISTEN:7443,fork,reuseaddr TCP:127.0.0.1:7443 &
# The platform's device stays readable for evidence; nothing else of the host is here.
chown 10001 /dev/nsm
exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all \
    cutlayer enclave serve --config /etc/cutlayer/enclave.toml
