{{/* The Serve configuration: `app` as it is, and what only the chart can know. */}}
{{- define "adakv.serveConfig" -}}
{{- $args := dict -}}
{{- range $name, $section := .Values.app -}}
  {{- if or $section (eq $name "compression") }}{{ $_ := set $args $name (deepCopy $section) }}{{ end -}}
{{- end -}}
{{- $replica := $args.replica | default dict -}}
{{- /* Limits of the ingress are for the largest fleet. */ -}}
{{- $_ := set $replica "count" (max 1 (int .Values.replicas.max)) -}}
{{- if and (not .Values.gpu.enabled) (not (hasKey $replica "cpus")) -}}
  {{- $_ := set $replica "cpus" (int .Values.worker.cpus) -}}
{{- end -}}
{{- $_ := set $args "replica" $replica -}}
{{- if .Values.secrets.apiKeys -}}
  {{- $_ := set $args "auth" (merge (dict "keys_file" "/etc/adakv/keys/keys") ($args.auth | default dict)) -}}
{{- end -}}
{{- /* Two Ray clusters run during an upgrade, and replicas of one must not find those of the other. */ -}}
{{- $generation := include "adakv.cluster" (dict "root" . "counts" false) | fromYaml | toJson | sha256sum | trunc 8 -}}
{{- $_ := set $args "store" (dict "url_env" "ADAKV_STORE_URL" "key_prefix" (printf "%s-%s-%s" .Release.Namespace .Release.Name $generation)) -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
logging_config:
  enable_access_log: false
applications:
  - name: llm
    route_prefix: /
    import_path: adakv_serve.serving.app:build
    args:
      {{- toYaml $args | nindent 6 }}
{{- if gt (int .Values.replicas.max) (int .Values.replicas.min) }}
    deployments:
      - name: Engine
        num_replicas: auto
        autoscaling_config:
          min_replicas: {{ int .Values.replicas.min }}
          max_replicas: {{ int .Values.replicas.max }}
          {{- omit .Values.autoscaling "policy" | toYaml | nindent 10 }}
          policy:
            policy_function: adakv_serve.serving.autoscaling:OccupancyPolicy
            policy_kwargs:
              {{- toYaml .Values.autoscaling.policy | nindent 14 }}
{{- end }}
{{- end -}}
