#!/usr/bin/env bash
# Makes the key by which a hospital's node is known: DIR/NAME (never leaves the hospital) and
# DIR/NAME.pub (goes to the coordinator).
set -euo pipefail
shopt -s inherit_errexit
umask 077

fail() {
    echo "$0: $*" >&2
    exit 1
}

if [[ $# -ne 2 ]]; then
    echo "usage: $0 DIR NAME" >&2
    exit 2
fi
readonly DIR=$1 NAME=$2 KEY=$1/$2
[[ $NAME =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ && $NAME != *.pub ]] ||
    fail "NAME must consist of letters, digits, '.', '_' and '-' and not end in .pub, got '$NAME'"

mkdir -p "$DIR"
if [[ -e $KEY || -e $KEY.pub ]]; then
    [[ -e $KEY ]] || fail "$KEY.pub is there without $KEY; nothing was changed. Restore the key or use another name"
    [[ -e $KEY.pub ]] || fail "$KEY is there without $KEY.pub; nothing was changed. Get it back: ssh-keygen -y -f $KEY > $KEY.pub"
    private=$(ssh-keygen -y -P "" -f "$KEY") || fail "$KEY cannot be read without a passphrase, as a node has to; nothing was changed"
    [[ $(cut -d' ' -f1,2 <<<"$private") == $(cut -d' ' -f1,2 "$KEY.pub") ]] ||
        fail "$KEY and $KEY.pub do not belong together; nothing was changed"
    [[ $private == "ecdsa-sha2-nistp384 "* ]] || fail "$KEY is not an ECDSA key on P-384; nothing was changed. Use another name"
    echo "kept $KEY and $KEY.pub"
else
    # Flower takes no passphrase, so the file's mode is what guards the key.
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "$NAME" -f "$KEY"
    chmod 644 "$KEY.pub"
    echo "made $KEY (never leaves this hospital) and $KEY.pub (goes to the coordinator)"
fi
ssh-keygen -l -f "$KEY.pub"
