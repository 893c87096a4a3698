#!/usr/bin/env bash
# Makes a certificate authority of the federation's own: DIR/ca.key and DIR/ca.crt.
set -euo pipefail
shopt -s inherit_errexit
umask 077

if [[ $# -ne 1 ]]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
readonly DIR=$1 KEY=$1/ca.key CERTIFICATE=$1/ca.crt
readonly DAYS=3650

fail() {
    echo "$0: $*" >&2
    exit 1
}

public_key_of() {
    openssl pkey -in "$1" -pubout
}

mkdir -p "$DIR"
if [[ -e $KEY || -e $CERTIFICATE ]]; then
    [[ -e $KEY ]] || fail "$CERTIFICATE is there without $KEY; nothing was changed. Restore the key or name another folder"
    [[ -e $CERTIFICATE ]] || fail "$KEY is there without $CERTIFICATE; nothing was changed. Restore the certificate or name another folder"
    [[ $(public_key_of "$KEY") == $(openssl x509 -in "$CERTIFICATE" -noout -pubkey) ]] ||
        fail "$KEY and $CERTIFICATE do not belong together; nothing was changed"
    openssl x509 -in "$CERTIFICATE" -noout -checkend 0 >/dev/null ||
        fail "$CERTIFICATE has expired; nothing was changed. Name another folder for a new authority"
    echo "kept $KEY and $CERTIFICATE"
    exit 0
fi

# Built apart and moved last, so that an interruption leaves no half of the pair.
new=$(mktemp -d "$DIR/.ca.XXXXXX")
trap 'rm -rf "$new"' EXIT
openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$new/ca.key"
openssl req -x509 -new -key "$new/ca.key" -sha384 -days "$DAYS" -subj "/CN=feddm federation CA" \
    -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -out "$new/ca.crt"
chmod 644 "$new/ca.crt"
mv -n "$new/ca.key" "$KEY"
mv -n "$new/ca.crt" "$CERTIFICATE"
echo "made $KEY (keep it off every server) and $CERTIFICATE (goes to every hospital)"
openssl x509 -in "$CERTIFICATE" -noout -enddate -fingerprint -sha256
