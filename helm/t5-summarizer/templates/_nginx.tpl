{{/* Names at NGINX' http level are shared by all hosts of a controller: each release has its own. */}}
{{- define "t5.nginxSuffix" -}}
{{- printf "%s/%s" .Release.Namespace (include "t5.fullname" .) | sha256sum | trunc 8 -}}
{{- end -}}

{{- define "t5.nginxHttp" -}}
{{- $suffix := include "t5.nginxSuffix" . -}}
# Exists even when the apiKey policy is refused, or the whole configuration would be.
map "" $apikey_client_name {
    default "";
}
# Keys are named CLIENT.ID, so that a client can have two while one replaces the other.
map $apikey_client_name $t5_client_{{ $suffix }} {
    default $apikey_client_name;
    "~^(?<t5_name_{{ $suffix }}>.+)\.[0-9a-f]{8}$" $t5_name_{{ $suffix }};
}
map $http_x_request_id $t5_request_id_{{ $suffix }} {
    default $request_id;
    "~^[A-Za-z0-9._:-]{1,128}$" $http_x_request_id;
}
{{- if .Values.ingress.accessLog }}
log_format t5_{{ $suffix }} escape=json '{"time":"$time_iso8601","severity":"INFO","message":"access",'
    '"request_id":"$t5_request_id_{{ $suffix }}","client":"$t5_client_{{ $suffix }}","api_key":"$apikey_client_name",'
    '"host":"$host","method":"$request_method","path":"$uri","status":$status,"duration_s":$request_time,'
    '"upstream_status":"$upstream_status","upstream_duration_s":"$upstream_response_time",'
    '"request_bytes":$request_length,"response_bytes":$bytes_sent,"limit":"$limit_req_status",'
    '"remote_addr":"$remote_addr","user_agent":"$http_user_agent"}';
{{- end }}
{{- end -}}

{{/* Problem documents for the errors that NGINX itself makes, by status. */}}
{{- define "t5.nginxErrors" -}}
"401":
  kind: unauthorized
  title: Unauthorized
  detail: "Authorization: a bearer token is required"
  headers: {WWW-Authenticate: 'Bearer realm=\"t5-serve\"'}
"403":
  kind: forbidden
  title: Forbidden
  detail: "Authorization: the token is not known, has expired or was revoked"
  headers: {WWW-Authenticate: 'Bearer realm=\"t5-serve\", error=\"invalid_token\"'}
"413":
  kind: body-too-large
  title: Body too large
  detail: "body: must have at most {{ int64 .Values.limits.body_bytes }} bytes"
  errors: [{field: body, limit: {{ int64 .Values.limits.body_bytes }}, message: "must have at most {{ int64 .Values.limits.body_bytes }} bytes"}]
"429":
  kind: rate-limited
  title: Too many requests
  detail: "the rate limit of this client or address is reached"
  headers: {Retry-After: "{{ include "t5.retryAfter" .Values.ingress.rateLimit.rate }}"}
"500":
  kind: internal
  title: Internal error
  detail: "the ingress cannot check tokens: its policies or their Secret are missing or invalid"
"502":
  kind: unavailable
  title: Unavailable
  detail: "no replica could answer"
"504":
  kind: unavailable
  title: Unavailable
  detail: "no replica answered in time"
{{- end -}}

{{/* Seconds until a rate such as 120r/m lets the next request in, rounded up. */}}
{{- define "t5.retryAfter" -}}
{{- $requests := regexFind "^[0-9]+" . | float64 -}}
{{- divf (ternary 60 1 (hasSuffix "m" .)) $requests | ceil | int64 -}}
{{- end -}}

{{- define "t5.nginxServer" -}}
{{- $suffix := include "t5.nginxSuffix" . -}}
# Also for the subrequest that checks the key: it would answer 500 to a larger body.
client_max_body_size {{ int64 .Values.limits.body_bytes }};
{{- if .Values.ingress.accessLog }}
access_log /dev/stdout t5_{{ $suffix }};
{{- end }}
{{- range $status, $error := include "t5.nginxErrors" . | fromYaml }}
{{- $problem := dict "type" (printf "urn:t5-serve:problem:%s" $error.kind) "title" $error.title "status" (int $status) "detail" $error.detail "request_id" (printf "$t5_request_id_%s" $suffix) }}
{{- with $error.errors }}{{ $_ := set $problem "errors" . }}{{ end }}
location @t5_{{ $status }} {
    default_type application/problem+json;
    add_header X-Request-Id $t5_request_id_{{ $suffix }} always;
    {{- range $name, $value := $error.headers }}
    add_header {{ $name }} "{{ $value }}" always;
    {{- end }}
    return {{ $status }} '{{ $problem | toJson }}';
}
{{- end }}
{{- end -}}

{{/*
Of every route to the service: (dict "root" $ "client" "$variable"). `error_page` here and not as
`errorPages` of the route, which would also replace the service's own answers of these statuses.
*/}}
{{- define "t5.nginxLocation" -}}
{{- $suffix := include "t5.nginxSuffix" .root -}}
{{- range $status, $error := include "t5.nginxErrors" .root | fromYaml }}
error_page {{ $status }} @t5_{{ $status }};
{{- end }}
# Replaces what a client sent: only the ingress names clients.
proxy_set_header {{ .root.Values.auth.header }} {{ .client }};
proxy_set_header X-Request-Id $t5_request_id_{{ $suffix }};
proxy_set_header Authorization "";
# By these a client could control Ray Serve.
proxy_set_header X-Request-Timeout-Seconds "";
proxy_set_header X-Request-Disconnect-Disabled "";
proxy_set_header serve_multiplexed_model_id "";
{{- end -}}
