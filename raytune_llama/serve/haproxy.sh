#!/bin/sh
# Starts HAProxy for Ray Serve with what Ray Serve's generated config cannot be told otherwise:
# statistics and metrics on loopback only, an admin socket for this user only, a time limit for
# request headers, and errors in OpenAI's format. Ray Serve runs it as RAY_SERVE_HAPROXY_BINARY_PATH
# with "-f CONFIG" among its arguments; RAYTUNE_LLAMA_HAPROXY is the real binary.
set -eu
config=
previous=
for argument; do
	[ "$previous" != -f ] || config=$argument
	previous=$argument
done
if [ -n "$config" ]; then
	errors="$(dirname "$config")/503.http"
	printf '%s\r\n' 'HTTP/1.1 503 Service Unavailable' 'Content-Type: application/json' \
		'Retry-After: 1' 'Cache-Control: no-cache' 'Connection: close' '' > "$errors"
	printf '%s' '{"error":{"message":"No replica of the model could answer. Please try again later.",' \
		'"type":"server_error","param":null,"code":null}}' >> "$errors"
	# Written aside and moved: a HAProxy that is being replaced may read it at the same time.
	sed -e '/^frontend prometheus/,/^frontend http_frontend/s/^\( *bind \):/\1127.0.0.1:/' \
		-e '/^listen stats/,$s/^\( *bind \)\*:/\1127.0.0.1:/' \
		-e '/^ *stats socket /s/ mode 666 / mode 600 /' \
		-e 's/^defaults$/defaults\n    timeout http-request 30s/' \
		-e "s|^\( *errorfile 50[234] \).*|\1$errors|" \
		"$config" > "$config.edited"
	chmod 600 "$config.edited"
	mv "$config.edited" "$config"
fi
exec "${RAYTUNE_LLAMA_HAPROXY:?names the HAProxy binary to start}" "$@"
