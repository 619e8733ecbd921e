#!/bin/sh
# Make the keys of the pod pair, beside this file: once, before `kubectl apply -k`.
set -eu
cd "$(dirname "$0")"
umask 077
for key in id host_key; do
    [ -f "$key" ] || ssh-keygen -q -t ed25519 -N '' -C vfu-dev -f "$key"
done
cp id.pub authorized_keys
printf 'vfu-dev-destination %s\n' "$(cat host_key.pub)" > known_hosts
