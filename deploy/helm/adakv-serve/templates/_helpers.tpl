{{/* Labels of everything; pods' labels change their Ray cluster, so these hold no version. */}}
{{- define "adakv.labels" -}}
app.kubernetes.io/name: adakv-serve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "adakv.rayLabels" -}}
{{ include "adakv.labels" . }}
app.kubernetes.io/component: ray
{{- end -}}

{{- define "adakv.redisLabels" -}}
{{ include "adakv.labels" . }}
app.kubernetes.io/component: redis
{{- end -}}

{{/* What a schema cannot say. */}}
{{- define "adakv.check" -}}
{{- $name := .Release.Name -}}
{{- if gt (len $name) 40 -}}
  {{- fail (printf "the release's name %q is longer than 40 characters: KubeRay appends to it" $name) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
  {{- fail (printf "the release's name %q must begin with a letter and have no dot" $name) -}}
{{- end -}}
{{- $min := int .Values.replicas.min -}}
{{- $max := int .Values.replicas.max -}}
{{- if lt $max $min -}}
  {{- fail (printf "replicas.max=%d is below replicas.min=%d" $max $min) -}}
{{- end -}}
{{- if and (not .Values.secrets.apiKeys) (not (dig "auth" "open" false .Values.app)) -}}
  {{- fail "secrets.apiKeys is empty: name a Secret with a file of keys, or set app.auth.open=true to serve without keys" -}}
{{- end -}}
{{- if not .Values.secrets.store -}}
  {{- fail "secrets.store is empty: name a Secret with the key `password` (store.redis.enabled) or `url`" -}}
{{- end -}}
{{- if and .Values.secrets.tls (eq $min 0) -}}
  {{- fail "secrets.tls needs replicas.min of 1 or more: with 0 the head answers, which KubeRay checks by plain HTTP" -}}
{{- end -}}
{{- $parallel := int (include "adakv.parallel" .) -}}
{{- if and .Values.gpu.enabled (lt (int (include "adakv.gpus" .)) $parallel) (not (dig "replica" "placement_group_bundles" nil .Values.app)) -}}
  {{- fail (printf "gpu.perPod=%s is below app.engine.tensor_parallel_size=%d: an engine has its GPUs in one pod" (include "adakv.gpus" .) $parallel) -}}
{{- end -}}
{{- if gt (int .Values.localPorts.min) (int .Values.localPorts.max) -}}
  {{- fail (printf "localPorts.min=%d is above localPorts.max=%d" (int .Values.localPorts.min) (int .Values.localPorts.max)) -}}
{{- end -}}
{{- range list 30000 31000 8500 44217 52365 -}}
  {{- if and (ge . (int $.Values.localPorts.min)) (le . (int $.Values.localPorts.max)) -}}
    {{- fail (printf "localPorts contain %d, which has a use of its own: take 20000 to 29999" .) -}}
  {{- end -}}
{{- end -}}
{{- $minPods := int (include "adakv.minPods" .) -}}
{{- $maxPods := int (include "adakv.maxPods" .) -}}
{{- if lt $maxPods $minPods -}}
  {{- fail (printf "worker.maxPods=%d is below worker.minPods=%d" $maxPods $minPods) -}}
{{- end -}}
{{- end -}}

{{- define "adakv.parallel" -}}
{{ dig "engine" "tensor_parallel_size" 1 .Values.app | int }}
{{- end -}}

{{- define "adakv.gpus" -}}
{{- if kindIs "invalid" .Values.gpu.perPod }}{{ include "adakv.parallel" . }}{{ else }}{{ int .Values.gpu.perPod }}{{ end -}}
{{- end -}}

{{/* Replicas that only lend, beside the others. */}}
{{- define "adakv.lenders" -}}
{{- $spill := .Values.app.spill | default dict -}}
{{- if and $spill.enabled (kindIs "map" $spill.lenders) }}{{ dig "lenders" "count" 1 $spill | int }}{{ else }}0{{ end -}}
{{- end -}}

{{- define "adakv.minPods" -}}
{{- if kindIs "invalid" .Values.worker.minPods }}{{ add (int .Values.replicas.min) (int (include "adakv.lenders" .)) }}{{ else }}{{ int .Values.worker.minPods }}{{ end -}}
{{- end -}}

{{- define "adakv.maxPods" -}}
{{- if kindIs "invalid" .Values.worker.maxPods }}{{ add (int .Values.replicas.max) (int (include "adakv.lenders" .)) }}{{ else }}{{ int .Values.worker.maxPods }}{{ end -}}
{{- end -}}

{{/* How long the Ray cluster from before an upgrade serves on. */}}
{{- define "adakv.deletionDelay" -}}
{{- if kindIs "invalid" .Values.upgrade.deletionDelaySeconds -}}
{{ max 60 (dig "replica" "graceful_shutdown_timeout_s" 120 .Values.app | int) }}
{{- else -}}
{{ int .Values.upgrade.deletionDelaySeconds }}
{{- end -}}
{{- end -}}
