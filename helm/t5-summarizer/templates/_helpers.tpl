{{- define "t5.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/*
At most 47 characters: KubeRay appends 6 to name the cluster, whose name may have 53, because
"-serve-svc" goes behind it and a Service's name ends at 63.
*/}}
{{- define "t5.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 47 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 47 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "t5.selectorLabels" -}}
app.kubernetes.io/part-of: {{ include "t5.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "t5.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "t5.name" . | quote }}
{{ include "t5.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
Labels of a pod: (dict "root" $ "component" "head" "extra" {…}). No chart or application version
among them: a label of the pod template that changes makes KubeRay build a new cluster. And no
app.kubernetes.io/name: KubeRay's Services select pods by its own value of it.
*/}}
{{- define "t5.podLabels" -}}
{{ include "t5.selectorLabels" .root }}
app.kubernetes.io/component: {{ .component }}
{{- with .extra }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "t5.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "t5.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "t5.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end -}}

{{- define "t5.pruneServiceAccountName" -}}
{{ .Values.tokens.prune.serviceAccountName | default (printf "%s-tokens" (include "t5.fullname" .)) }}
{{- end -}}

{{- define "t5.authMode" -}}
{{- .Values.auth.mode | default (ternary "trusted-header" "token" .Values.ingress.enabled) -}}
{{- end -}}

{{/* The type of a Secret cannot be changed, so each way of checking tokens has its own name. */}}
{{- define "t5.tokensSecret" -}}
{{- .Values.tokens.existingSecret | default (printf "%s-%s" (include "t5.fullname" .) (ternary "api-keys" "tokens" .Values.ingress.enabled)) -}}
{{- end -}}

{{/* With the namespace: a PriorityClass belongs to the whole cluster. */}}
{{- define "t5.ownPriorityClass" -}}
{{- printf "%s-%s" .Release.Namespace (include "t5.fullname" .) -}}
{{- end -}}

{{- define "t5.priorityClassName" -}}
{{- if .name -}}
{{- .name -}}
{{- else if .root.Values.priorityClass.create -}}
{{- include "t5.ownPriorityClass" .root -}}
{{- end -}}
{{- end -}}

{{/* Milli-CPUs of a quantity such as 500m, 2 or 1.5. */}}
{{- define "t5.milliCpus" -}}
{{- $quantity := toString . -}}
{{- if hasSuffix "m" $quantity -}}
{{- trimSuffix "m" $quantity | int64 -}}
{{- else -}}
{{- round (mulf (float64 $quantity) 1000) 0 | int64 -}}
{{- end -}}
{{- end -}}

{{/* What Ray counts as a group's CPUs: KubeRay rounds the limit up, or the request where there is none. */}}
{{- define "t5.rayCpus" -}}
{{- $cpu := dig "limits" "cpu" (dig "requests" "cpu" "" .) . -}}
{{- divf (include "t5.milliCpus" $cpu | float64) 1000 | ceil | int64 -}}
{{- end -}}

{{/* A map as YAML, without what is null. Helm reads numbers as floats and would print 4e+06. */}}
{{- define "t5.settings" -}}
{{- $lines := list -}}
{{- range $key, $value := . -}}
{{- if and (kindIs "float64" $value) (eq (float64 $value) (floor $value)) -}}
{{- $lines = append $lines (printf "%s: %d" $key (int64 $value)) -}}
{{- else if not (kindIs "invalid" $value) -}}
{{- $lines = append $lines (printf "%s: %s" $key (toJson $value)) -}}
{{- end -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end -}}

{{- define "t5.requestSeconds" -}}
{{- .Values.limits.timeout_s | ceil | int64 -}}
{{- end -}}

{{/* Pods that hold so many replicas: (list replicas replicasPerWorker). */}}
{{- define "t5.pods" -}}
{{- divf (index . 0) (index . 1) | ceil | int64 -}}
{{- end -}}

{{/* Replicas at most while an update runs: (list replicas max_surge_percent). */}}
{{- define "t5.surged" -}}
{{- addf (index . 0) (divf (mulf (index . 0) (index . 1)) 100 | ceil) | int64 -}}
{{- end -}}

{{/*
Bounds of a worker group: (dict "root" $ "config" … "least" n "most" n), least and most in replicas.
With the autoscaler they stand apart from Serve's replicas on purpose: KubeRay (1.6) hands changes
of them to new clusters only, so bounds taken from the replicas would hold a running cluster to
the replicas it began with. Pods that no replica needs go anyway.
*/}}
{{- define "t5.groupSize" -}}
{{- $perWorker := .config.replicasPerWorker -}}
{{- if .root.Values.autoscaler.enabled -}}
{{- $min := int64 .config.workers.minReplicas -}}
replicas: {{ max $min (include "t5.pods" (list .least $perWorker) | int64) }}
minReplicas: {{ $min }}
maxReplicas: {{ int64 .config.workers.maxReplicas }}
idleTimeoutSeconds: {{ int64 .config.workers.idleTimeoutSeconds }}
{{- else -}}
{{- $pods := include "t5.pods" (list .most $perWorker) -}}
replicas: {{ $pods }}
minReplicas: {{ $pods }}
maxReplicas: {{ $pods }}
{{- end -}}
{{- end -}}

{{- define "t5.summarizerNodeSelector" -}}
{{- $gpu := .Values.summarizer.gpu -}}
{{- $labels := dict -}}
{{- if $gpu.enabled -}}
{{- with $gpu.accelerator }}{{ $_ := set $labels "cloud.google.com/gke-accelerator" . }}{{ end -}}
{{- if $gpu.spot }}{{ $_ := set $labels "cloud.google.com/gke-spot" "true" }}{{ end -}}
{{- end -}}
{{- toYaml (merge (deepCopy .Values.summarizer.workers.nodeSelector) $labels) -}}
{{- end -}}

{{- define "t5.summarizerTolerations" -}}
{{- $gpu := .Values.summarizer.gpu -}}
{{- $tolerations := .Values.summarizer.workers.tolerations -}}
{{- if $gpu.enabled -}}
{{- $tolerations = append $tolerations (dict "key" $gpu.resourceName "operator" "Exists" "effect" "NoSchedule") -}}
{{- if $gpu.spot -}}
{{- $tolerations = append $tolerations (dict "key" "cloud.google.com/gke-spot" "operator" "Equal" "value" "true" "effect" "NoSchedule") -}}
{{- end -}}
{{- end -}}
{{- toYaml $tolerations -}}
{{- end -}}

{{- define "t5.summarizerResources" -}}
{{- $resources := deepCopy .Values.summarizer.workers.resources -}}
{{- if .Values.summarizer.gpu.enabled -}}
{{- $gpu := dict .Values.summarizer.gpu.resourceName (toString (int64 .Values.summarizer.gpu.count)) -}}
{{- $resources = merge $resources (dict "requests" $gpu "limits" $gpu) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "t5.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.securityContext.runAsUser }}
runAsGroup: {{ int64 .Values.securityContext.runAsUser }}
fsGroup: {{ int64 .Values.securityContext.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "t5.containerSecurityContext" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
privileged: false
readOnlyRootFilesystem: {{ .Values.securityContext.readOnlyRootFilesystem }}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "t5.env" -}}
# The one place besides mounts that can be written to, with a read-only root.
- name: HOME
  value: /tmp
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
# A replica's stderr has the service's own JSON lines alone; Serve's, which are plain text there, are
# in Ray's folder of logs, as `serve.logging` says.
- name: RAY_SERVE_LOG_TO_STDERR
  value: "0"
# A replica's own code has no event loop and thread of its own beside Serve's: each has to wait for
# Python's lock, which an engine's thread holds most of the time.
- name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD
  value: "0"
{{- if not .Values.rayAuth.enabled }}
# Said outright: Ray's default differs between versions.
- name: RAY_AUTH_MODE
  value: disabled
{{- end }}
{{- if .Values.serve.haproxy }}
- name: RAY_SERVE_ENABLE_HA_PROXY
  value: "1"
{{- end }}
{{- if .Values.tracing.serveSpans }}
# By the environment, not by Serve's configuration: its proxies start before they know that.
- name: RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH
  value: serve_app.tracing.serve:span_processors
- name: RAY_SERVE_TRACING_SAMPLING_RATIO
  value: {{ .Values.tracing.sample_ratio | quote }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ .Values.tracing.endpoint | quote }}
- name: OTEL_SERVICE_NAME
  value: ray-serve
{{- end }}
{{- if eq .Values.model.source "hub" }}
- name: HF_HOME
  value: /var/cache/huggingface
- name: HF_HUB_DISABLE_TELEMETRY
  value: "1"
{{- with .Values.model.hub.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- with .Values.model.hub.tokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .name | quote }}
      key: {{ .key | quote }}
{{- end }}
{{- end }}
{{- else }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The port of `tracing.endpoint`, for the network policy. */}}
{{- define "t5.tracingPort" -}}
{{- $url := urlParse .Values.tracing.endpoint -}}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "443" "80" (eq $url.scheme "https")) -}}
{{- end -}}

{{- define "t5.usageFolder" -}}
/var/log/t5-serve
{{- end -}}

{{/*
Passes usage events on to its own standard output, which is what a cluster collects: a replica's does
not leave Ray's files. An init container that stays: it starts anew by itself when it ends, although
worker pods have `restartPolicy: Never`, and it stops after the replicas, whose last lines it still
passes on.
*/}}
{{- define "t5.usageSidecar" -}}
- name: usage
  image: {{ include "t5.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  restartPolicy: Always
  command: [t5-serve, usage, tail, --follow, --folder, {{ include "t5.usageFolder" . }}]
  resources:
    {{- toYaml .Values.usage.sidecar.resources | nindent 4 }}
  securityContext:
    {{- include "t5.containerSecurityContext" . | nindent 4 }}
  volumeMounts:
    - name: usage
      mountPath: {{ include "t5.usageFolder" . }}
{{- end -}}

{{/* Mounts of a worker: (dict "root" $ "component" "api"). */}}
{{- define "t5.workerMounts" -}}
- name: tmp
  mountPath: /tmp
{{- with .root.Values.model }}
{{- if eq .source "pvc" }}
- name: model
  mountPath: {{ .pvc.mountPath | quote }}
  readOnly: true
{{- else if eq .source "hub" }}
- name: hub-cache
  mountPath: /var/cache/huggingface
{{- end }}
{{- end }}
{{- if and (eq .component "api") (eq (include "t5.authMode" .root) "token") }}
# The whole folder: a file mounted by subPath would not follow changes of the Secret.
- name: tokens
  mountPath: /etc/t5-serve
  readOnly: true
{{- end }}
{{- if and (eq .component "api") .root.Values.usage.enabled }}
- name: usage
  mountPath: {{ include "t5.usageFolder" .root }}
{{- end }}
{{- with .root.Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "t5.workerVolumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .root.Values.tmpSizeLimit | quote }}
{{- with .root.Values.model }}
{{- if eq .source "pvc" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ .pvc.claimName | quote }}
    readOnly: true
{{- else if eq .source "hub" }}
- name: hub-cache
  {{- if .hub.cache.claimName }}
  persistentVolumeClaim:
    claimName: {{ .hub.cache.claimName | quote }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .hub.cache.sizeLimit | quote }}
  {{- end }}
{{- end }}
{{- end }}
{{- if and (eq .component "api") (eq (include "t5.authMode" .root) "token") }}
- name: tokens
  secret:
    secretName: {{ include "t5.tokensSecret" .root | quote }}
    # Without it nobody gets in, but the pods start.
    optional: true
{{- end }}
{{- if and (eq .component "api") .root.Values.usage.enabled }}
- name: usage
  emptyDir:
    # All files at their largest, and one more for each replica: a full volume would evict the pod.
    sizeLimit: {{ mul (add (int64 .root.Values.usage.keep) (int64 .root.Values.api.replicasPerWorker)) (add (int64 .root.Values.usage.max_bytes) 1048576) | quote }}
{{- end }}
{{- with .root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
A worker group: (dict "root" $ "component" "api" "config" .Values.api "least" 1 "most" 2
"resources" "…" "nodeSelector" "…" "tolerations" "…"). A Ray resource with the component's name
places the replicas of a deployment in this group and nowhere else.
*/}}
{{- define "t5.workerGroup" -}}
{{- $root := .root -}}
{{- $workers := .config.workers -}}
- groupName: {{ .component }}
  # What the API server and the operator write by themselves, written out: a comparison with the
  # cluster then finds no difference, and the operator does not become the owner of this list, with
  # whom the next `helm upgrade` would be in conflict.
  numOfHosts: 1
  scaleStrategy: {}
  {{- include "t5.groupSize" . | nindent 2 }}
  rayStartParams: {}
  resources:
    {{ .component }}: {{ int64 .config.replicasPerWorker | toString | quote }}
  template:
    metadata:
      labels:
        {{- include "t5.podLabels" (dict "root" $root "component" .component "extra" $workers.podLabels) | nindent 8 }}
      {{- with $workers.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "t5.serviceAccountName" $root | quote }}
      automountServiceAccountToken: false
      {{- with $root.Values.image.pullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . | quote }}
        {{- end }}
      {{- end }}
      {{- with include "t5.priorityClassName" (dict "root" $root "name" $workers.priorityClassName) }}
      priorityClassName: {{ . | quote }}
      {{- end }}
      securityContext:
        {{- include "t5.podSecurityContext" $root | nindent 8 }}
      # Draining, and a little for Ray to stop.
      terminationGracePeriodSeconds: {{ add $root.Values.drain.timeoutSeconds 20 }}
      {{- if ne .nodeSelector "{}" }}
      nodeSelector:
        {{- .nodeSelector | nindent 8 }}
      {{- end }}
      {{- if ne .tolerations "[]" }}
      tolerations:
        {{- .tolerations | nindent 8 }}
      {{- end }}
      {{- with $workers.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $workers.topologySpread }}
      topologySpreadConstraints:
        {{- range . }}
        - maxSkew: 1
          topologyKey: {{ . | quote }}
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "t5.podLabels" (dict "root" $root "component" $.component) | nindent 14 }}
        {{- end }}
      {{- end }}
      {{- if and (eq .component "api") $root.Values.usage.sidecar.enabled }}
      initContainers:
        {{- include "t5.usageSidecar" $root | nindent 8 }}
      {{- end }}
      containers:
        - name: ray-worker
          image: {{ include "t5.image" $root | quote }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          ports:
            - name: serve
              containerPort: 8000
              protocol: TCP
            - name: metrics
              containerPort: 8080
              protocol: TCP
          env:
            {{- include "t5.env" $root | nindent 12 }}
          resources:
            {{- .resources | nindent 12 }}
          securityContext:
            {{- include "t5.containerSecurityContext" $root | nindent 12 }}
          lifecycle:
            preStop:
              exec:
                command: [python, -m, serve_app.drain, --timeout-s, {{ int64 $root.Values.drain.timeoutSeconds | quote }}]
          volumeMounts:
            {{- include "t5.workerMounts" . | nindent 12 }}
      volumes:
        {{- include "t5.workerVolumes" . | nindent 8 }}
{{- end -}}

{{/* What to do, and where more of it stands: (dict "rules" .Values.metrics.rules "alert" "T5Down" "do" "…"). */}}
{{- define "t5.runbook" -}}
runbook: {{ .do | quote }}
{{- with .rules.runbookUrl }}
runbook_url: {{ printf "%s#%s" . (lower $.alert) | quote }}
{{- end }}
{{- end -}}
