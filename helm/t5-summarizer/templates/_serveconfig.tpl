{{- define "t5.modelName" -}}
{{- if eq .Values.model.source "pvc" -}}
{{- printf "%s/%s" (trimSuffix "/" .Values.model.pvc.mountPath) .Values.model.name -}}
{{- else -}}
{{- .Values.model.name -}}
{{- end -}}
{{- end -}}

{{/*
Serve's configuration. Replicas, autoscaling, queues, health and rate limits stand under `deployments`, not
among the application's `args`: Serve takes changes there without touching a replica, while any
change of `args` replaces them all.
*/}}
{{- define "t5.serveConfig" -}}
{{- $api := .Values.api -}}
{{- $summarizer := .Values.summarizer -}}
{{- $scaling := $summarizer.autoscaling_config -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
  {{- include "t5.settings" .Values.serve.http | nindent 2 }}
logging_config:
  {{- include "t5.settings" .Values.serve.logging | nindent 2 }}
applications:
  - name: t5-serve
    route_prefix: /
    import_path: serve_app.app:build
    args:
      model:
        name: {{ include "t5.modelName" . | quote }}
        {{- include "t5.settings" (omit .Values.model "source" "name" "pvc" "hub") | nindent 8 }}
      engine:
        {{- include "t5.settings" .Values.engine | nindent 8 }}
      api:
        {{- include "t5.settings" (pick $api "ready_step_age_s" "parts_in_flight") | nindent 8 }}
      limits:
        {{- include "t5.settings" .Values.limits | nindent 8 }}
      auth:
        mode: {{ include "t5.authMode" . | quote }}
        header: {{ .Values.auth.header | quote }}
        {{- if eq (include "t5.authMode" .) "token" }}
        tokens_file: /etc/t5-serve/tokens.json
        {{- end }}
      log:
        {{- include "t5.settings" .Values.log | nindent 8 }}
      usage:
        {{- include "t5.settings" (omit .Values.usage "sidecar") | nindent 8 }}
        folder: {{ include "t5.usageFolder" . }}
      tracing:
        {{- include "t5.settings" (omit .Values.tracing "serveSpans") | nindent 8 }}
    deployments:
      - name: Api
        num_replicas: {{ int64 $api.replicas }}
        ray_actor_options:
          num_cpus: {{ $api.num_cpus }}
          resources: {api: 1}
        max_ongoing_requests: {{ int64 $api.max_ongoing_requests }}
        max_queued_requests: {{ int64 $api.max_queued_requests }}
        backpressure_config:
          {{- include "t5.settings" $api.backpressure_config | nindent 10 }}
        user_config:
          rate_limits:
            {{- include "t5.settings" .Values.rate_limits | nindent 12 }}
        {{- include "t5.lifecycle" (dict "root" . "config" $api) | nindent 8 }}
      - name: Summarizer
        autoscaling_config:
          {{- include "t5.settings" (omit $scaling "initial_replicas" "signal" "target_drain_s") | nindent 10 }}
          {{- if eq $scaling.signal "tokens" }}
          policy:
            policy_function: serve_app.scaling:TokenPolicy
            policy_kwargs: {target_drain_s: {{ $scaling.target_drain_s }}}
          {{- end }}
          initial_replicas: {{ if kindIs "invalid" $scaling.initial_replicas }}{{ max 1 (int64 $scaling.min_replicas) }}{{ else }}{{ int64 $scaling.initial_replicas }}{{ end }}
        ray_actor_options:
          num_cpus: {{ $summarizer.num_cpus }}
          num_gpus: {{ ternary $summarizer.num_gpus 0 $summarizer.gpu.enabled }}
          resources: {summarizer: 1}
        max_ongoing_requests: {{ int64 $summarizer.max_ongoing_requests }}
        max_queued_requests: {{ int64 $summarizer.max_queued_requests }}
        {{- include "t5.lifecycle" (dict "root" . "config" $summarizer) | nindent 8 }}
{{- end -}}

{{- define "t5.lifecycle" -}}
graceful_shutdown_timeout_s: {{ if kindIs "invalid" .config.graceful_shutdown_timeout_s }}{{ include "t5.requestSeconds" .root }}{{ else }}{{ .config.graceful_shutdown_timeout_s }}{{ end }}
health_check_period_s: {{ .config.health_check_period_s }}
health_check_timeout_s: {{ .config.health_check_timeout_s }}
max_surge_percent: {{ int64 .config.max_surge_percent }}
{{- end -}}
