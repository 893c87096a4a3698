#!/usr/bin/env bash
# Makes the server's key and a certificate for its names, signed by DIR/ca.key:
# DIR/server.key and DIR/server.pem. It is for localhost and 127.0.0.1 as well, where the SuperLink
# reaches itself: without them a run stays pending and nobody says why. With --renew a new certificate for the same key replaces an
# old one, which is kept beside it under the day on which it expires.
set -euo pipefail
shopt -s inherit_errexit
umask 077

usage() {
    echo "usage: [DAYS=825] $0 [--renew] DIR HOST...    (HOST: a DNS name or an IP address)" >&2
    exit 2
}

fail() {
    echo "$0: $*" >&2
    exit 1
}

renew=false
if [[ ${1-} == --renew ]]; then
    renew=true
    shift
fi
[[ $# -ge 2 ]] || usage
readonly DIR=$1 KEY=$1/server.key CERTIFICATE=$1/server.pem
readonly CA=$1/ca.crt CA_KEY=$1/ca.key
readonly DAYS=${DAYS:-825}
shift
[[ $DAYS =~ ^[1-9][0-9]*$ ]] || fail "DAYS must be a whole number above 0, got '$DAYS'"
for file in "$CA" "$CA_KEY"; do
    [[ -r $file ]] || fail "$file is missing; make-ca.sh $DIR makes it"
done

names=()
for host in "$@" localhost 127.0.0.1; do
    if [[ $host =~ ^[0-9]+(\.[0-9]+){3}$ || $host =~ ^[0-9A-Fa-f]*:[0-9A-Fa-f:]+$ ]]; then
        names+=("IP:$host")
    elif [[ $host =~ ^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$ ]]; then
        names+=("DNS:$host")
    else
        fail "HOST must be a DNS name or an IP address without a port, got '$host'"
    fi
done

covers() {
    local name option
    for name in "${names[@]}"; do
        option=-checkhost
        [[ $name == IP:* ]] && option=-checkip
        openssl x509 -in "$CERTIFICATE" -noout "$option" "${name#*:}" | grep -q "does match" || return 1
    done
}

public_key_of() {
    openssl pkey -in "$1" -pubout
}

[[ ! -e $CERTIFICATE || -e $KEY ]] || fail "$CERTIFICATE is there without $KEY; nothing was changed"
if [[ -e $CERTIFICATE && $renew == false ]]; then
    [[ $(public_key_of "$KEY") == $(openssl x509 -in "$CERTIFICATE" -noout -pubkey) ]] ||
        fail "$KEY and $CERTIFICATE do not belong together; nothing was changed"
    openssl verify -CAfile "$CA" "$CERTIFICATE" >/dev/null ||
        fail "$CERTIFICATE is not valid under $CA; nothing was changed. $0 --renew makes a new one"
    covers || fail "$CERTIFICATE is not for all of: $*; nothing was changed. $0 --renew makes a new one"
    echo "kept $KEY and $CERTIFICATE"
    exit 0
fi
[[ -e $CERTIFICATE || $renew == false ]] || fail "there is no $CERTIFICATE to renew; leave --renew out"

new=$(mktemp -d "$DIR/.server.XXXXXX")
trap 'rm -rf "$new"' EXIT
key=$KEY
if [[ ! -e $KEY ]]; then
    key=$new/server.key
    openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$key"
fi
openssl req -new -key "$key" -sha384 -subj "/CN=feddm server" -out "$new/server.csr"
cat >"$new/extensions" <<END
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $(IFS=,; echo "${names[*]}")
END
openssl x509 -req -in "$new/server.csr" -CA "$CA" -CAkey "$CA_KEY" -sha384 -days "$DAYS" \
    -set_serial "0x$(openssl rand -hex 16)" -extfile "$new/extensions" -out "$new/server.pem" \
    2>"$new/errors" || fail "openssl could not sign: $(cat "$new/errors")"
openssl verify -CAfile "$CA" "$new/server.pem" >/dev/null
chmod 644 "$new/server.pem"
if [[ -e $CERTIFICATE ]]; then
    expires=$(date -u -d "$(openssl x509 -in "$CERTIFICATE" -noout -enddate | cut -d= -f2)" +%Y%m%dT%H%M%SZ)
    old=$DIR/server.until-$expires.$(openssl x509 -in "$CERTIFICATE" -noout -serial | cut -d= -f2).pem
    ln "$CERTIFICATE" "$old"
    echo "kept the old certificate as $old"
fi
[[ $key == "$KEY" ]] || mv -n "$key" "$KEY"
mv "$new/server.pem" "$CERTIFICATE"
echo "made $CERTIFICATE for $* (key: $KEY)"
openssl x509 -in "$CERTIFICATE" -noout -enddate -fingerprint -sha256
