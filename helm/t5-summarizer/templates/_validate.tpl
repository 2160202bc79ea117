{{/* Rules that a JSON schema cannot say. Each message names the key, the limit and the value. */}}
{{- define "t5.validate" -}}
{{- $values := .Values -}}
{{- $errors := list -}}

{{- $name := include "t5.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$" $name) -}}
{{- $errors = append $errors (printf "fullnameOverride: the name must be 1 to 47 of a-z 0-9 -, begin with a letter and not end with -, is %q" $name) -}}
{{- end -}}

{{- $mode := include "t5.authMode" . -}}
{{- if and $values.ingress.enabled (ne $mode "trusted-header") -}}
{{- $errors = append $errors (printf "auth.mode: must be trusted-header with ingress.enabled, is %q" $mode) -}}
{{- end -}}
{{- if and (eq $mode "trusted-header") (not $values.networkPolicy.enabled) -}}
{{- $errors = append $errors "networkPolicy.enabled: must be true with auth.mode trusted-header, is false: who reaches the port could name themselves" -}}
{{- end -}}
{{- if and (eq $mode "trusted-header") (ne $values.service.type "ClusterIP") -}}
{{- $errors = append $errors (printf "service.type: must be ClusterIP with auth.mode trusted-header, is %q: who reaches the port could name themselves" $values.service.type) -}}
{{- end -}}

{{- if and (eq $values.model.source "pvc") (not $values.model.pvc.claimName) -}}
{{- $errors = append $errors "model.pvc.claimName: required with model.source pvc, is empty" -}}
{{- end -}}
{{- if and (eq $values.model.source "image") (ne $values.model.name "demo") (not (hasPrefix "/" $values.model.name)) -}}
{{- $errors = append $errors (printf "model.name: must be demo or an absolute folder with model.source image, is %q" $values.model.name) -}}
{{- end -}}
{{- if and (eq $values.model.source "pvc") (hasPrefix "/" $values.model.name) -}}
{{- $errors = append $errors (printf "model.name: must be a folder inside the volume with model.source pvc, is %q" $values.model.name) -}}
{{- end -}}
{{- if and (eq $values.model.source "hub") (not (regexMatch "^[-._A-Za-z0-9]+/[-._A-Za-z0-9]+$" $values.model.name)) -}}
{{- $errors = append $errors (printf "model.name: must be a hub repository (owner/name) with model.source hub, is %q" $values.model.name) -}}
{{- end -}}
{{- if and (ne $values.model.source "hub") $values.model.revision -}}
{{- $errors = append $errors (printf "model.revision: only with model.source hub, which is %q" $values.model.source) -}}
{{- end -}}

{{- if gt (float64 $values.limits.default_timeout_s) (float64 $values.limits.timeout_s) -}}
{{- $errors = append $errors (printf "limits.default_timeout_s: must be at most limits.timeout_s (%v), is %v" $values.limits.timeout_s $values.limits.default_timeout_s) -}}
{{- end -}}

{{- if lt (float64 $values.drain.timeoutSeconds) (float64 $values.limits.timeout_s) -}}
{{- $errors = append $errors (printf "drain.timeoutSeconds: must be at least limits.timeout_s (%v), is %v" $values.limits.timeout_s $values.drain.timeoutSeconds) -}}
{{- end -}}

{{- $scaling := $values.summarizer.autoscaling_config -}}
{{- if gt (int64 $scaling.min_replicas) (int64 $scaling.max_replicas) -}}
{{- $errors = append $errors (printf "summarizer.autoscaling_config.min_replicas: must be at most max_replicas (%v), is %v" $scaling.max_replicas $scaling.min_replicas) -}}
{{- end -}}
{{- if not (kindIs "invalid" $scaling.initial_replicas) -}}
{{- if or (lt (int64 $scaling.initial_replicas) (int64 $scaling.min_replicas)) (gt (int64 $scaling.initial_replicas) (int64 $scaling.max_replicas)) -}}
{{- $errors = append $errors (printf "summarizer.autoscaling_config.initial_replicas: must be min_replicas (%v) to max_replicas (%v), is %v" $scaling.min_replicas $scaling.max_replicas $scaling.initial_replicas) -}}
{{- end -}}
{{- end -}}

{{- range $component := list "api" "summarizer" -}}
{{- $config := index $values $component -}}
{{- $cpus := include "t5.rayCpus" $config.workers.resources | float64 -}}
{{- $needed := mulf $config.num_cpus $config.replicasPerWorker -}}
{{- if gt $needed $cpus -}}
{{- $errors = append $errors (printf "%s.num_cpus: %v for each of %v replicas of a pod is above the pod's %v CPUs (%s.workers.resources)" $component $config.num_cpus $config.replicasPerWorker $cpus $component) -}}
{{- end -}}
{{- end -}}
{{- $gpu := $values.summarizer.gpu -}}
{{- if and $gpu.enabled (le (float64 $values.summarizer.num_gpus) 0.0) -}}
{{- $errors = append $errors "summarizer.num_gpus: must be above 0 with summarizer.gpu.enabled, is 0" -}}
{{- end -}}
{{- if and $gpu.enabled (gt (mulf $values.summarizer.num_gpus $values.summarizer.replicasPerWorker) (float64 $gpu.count)) -}}
{{- $errors = append $errors (printf "summarizer.num_gpus: %v for each of %v replicas of a pod is above summarizer.gpu.count (%v)" $values.summarizer.num_gpus $values.summarizer.replicasPerWorker $gpu.count) -}}
{{- end -}}

{{- range $component, $replicas := dict "api" $values.api.replicas "summarizer" $scaling.max_replicas -}}
{{- $config := index $values $component -}}
{{- $workers := $config.workers -}}
{{- $needed := include "t5.pods" (list (include "t5.surged" (list $replicas $config.max_surge_percent) | float64) $config.replicasPerWorker) | int64 -}}
{{- if gt (int64 $workers.minReplicas) (int64 $workers.maxReplicas) -}}
{{- $errors = append $errors (printf "%s.workers.minReplicas: must be at most maxReplicas (%v), is %v" $component $workers.maxReplicas $workers.minReplicas) -}}
{{- end -}}
{{- if lt (int64 $workers.maxReplicas) $needed -}}
{{- $errors = append $errors (printf "%s.workers.maxReplicas: must be at least %d for %v replicas and their surge, is %v" $component $needed $replicas $workers.maxReplicas) -}}
{{- end -}}
{{- end -}}

{{- if and $values.tracing.serveSpans (not $values.tracing.endpoint) -}}
{{- $errors = append $errors "tracing.endpoint: must be set with tracing.serveSpans, is null" -}}
{{- end -}}
{{- if and $values.usage.sidecar.enabled (not $values.usage.enabled) -}}
{{- $errors = append $errors "usage.enabled: must be true with usage.sidecar.enabled, is false: there would be no lines to pass on" -}}
{{- end -}}

{{- with $values.gcsFaultTolerance -}}
{{- if and .enabled (not .redisAddress) -}}
{{- $errors = append $errors "gcsFaultTolerance.redisAddress: required with gcsFaultTolerance.enabled, is empty" -}}
{{- end -}}
{{- end -}}

{{- with $values.ingress -}}
{{- if and .enabled (not .host) -}}
{{- $errors = append $errors "ingress.host: required with ingress.enabled, is empty" -}}
{{- end -}}
{{- if and .tls.certManager.clusterIssuer .tls.certManager.issuer -}}
{{- $errors = append $errors (printf "ingress.tls.certManager.issuer: not together with clusterIssuer (%q), is %q" .tls.certManager.clusterIssuer .tls.certManager.issuer) -}}
{{- end -}}
{{- if and (or .tls.certManager.clusterIssuer .tls.certManager.issuer) (not .tls.secretName) -}}
{{- $errors = append $errors "ingress.tls.secretName: required with ingress.tls.certManager, is empty" -}}
{{- end -}}
{{- if .dashboard.enabled -}}
{{- range $key := list "host" "basicAuthSecret" "tlsSecretName" -}}
{{- if not (index $values.ingress.dashboard $key) -}}
{{- $errors = append $errors (printf "ingress.dashboard.%s: required with ingress.dashboard.enabled, is empty" $key) -}}
{{- end -}}
{{- end -}}
{{- if not $values.networkPolicy.enabled -}}
{{- $errors = append $errors "networkPolicy.enabled: must be true with ingress.dashboard.enabled, is false" -}}
{{- end -}}
{{- if eq .dashboard.host .host -}}
{{- $errors = append $errors (printf "ingress.dashboard.host: must not be ingress.host, is %q" .dashboard.host) -}}
{{- end -}}
{{- end -}}
{{- if not (kindIs "invalid" .readTimeoutSeconds) -}}
{{- if le (float64 .readTimeoutSeconds) (float64 $values.limits.timeout_s) -}}
{{- $errors = append $errors (printf "ingress.readTimeoutSeconds: must be above limits.timeout_s (%v), is %v" $values.limits.timeout_s .readTimeoutSeconds) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- if and $values.smokeTest.enabled (ne $mode "off") (not $values.smokeTest.tokenSecret.name) -}}
{{- $errors = append $errors "smokeTest.tokenSecret.name: required with smokeTest.enabled, is empty" -}}
{{- end -}}

{{- if $errors -}}
{{- fail (printf "values:\n  %s" (join "\n  " $errors)) -}}
{{- end -}}
{{- end -}}
