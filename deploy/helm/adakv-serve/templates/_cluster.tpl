{{/*
The Ray cluster. Ports are those of docs/multinode.md.

counts: whether it has the numbers of pods. KubeRay changes those in a running cluster; anything
else makes a new one.
*/}}
{{- define "adakv.cluster" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
rayVersion: 2.60.0
{{- if $values.rayToken }}
authOptions:
  mode: token
{{- end }}
enableInTreeAutoscaling: true
autoscalerOptions:
  idleTimeoutSeconds: {{ int $values.worker.idleSeconds }}
  securityContext:
    {{- include "adakv.containerSecurity" $root | nindent 4 }}
headGroupSpec:
  rayStartParams:
    # No engine runs here.
    num-cpus: "0"
    num-gpus: "0"
    port: "6379"
    object-store-memory: {{ include "adakv.halfBytes" $values.head.sharedMemory | quote }}
    {{- include "adakv.ports" $root | nindent 4 }}
  template:
    {{- include "adakv.pod" (dict "root" $root "kind" "head" "group" $values.head) | nindent 4 }}
workerGroupSpecs:
  - groupName: engines
    {{- if .counts }}
    minReplicas: {{ include "adakv.minPods" $root }}
    maxReplicas: {{ include "adakv.maxPods" $root }}
    {{- end }}
    rayStartParams:
      num-cpus: {{ int $values.worker.cpus | quote }}
      {{- if $values.gpu.enabled }}
      num-gpus: {{ include "adakv.gpus" $root | quote }}
      {{- end }}
      object-store-memory: {{ include "adakv.halfBytes" $values.worker.sharedMemory | quote }}
      {{- include "adakv.ports" $root | nindent 6 }}
    template:
      {{- include "adakv.pod" (dict "root" $root "kind" "worker" "group" $values.worker) | nindent 6 }}
{{- end -}}

{{/* Half of a quantity, in bytes. Ray's objects get half of /dev/shm, and moving caches the rest: a
store that is larger than /dev/shm would lie on the node's disk. */}}
{{- define "adakv.halfBytes" -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 -}}
{{- $unit := regexFind "[A-Za-z]*$" . -}}
{{- $number := regexFind "^[0-9.]+" . | float64 -}}
{{- divf (mulf $number (get $units $unit | default 1)) 2 | int64 -}}
{{- end -}}

{{- define "adakv.ports" -}}
node-manager-port: "6380"
object-manager-port: "6381"
min-worker-port: "10002"
max-worker-port: "10999"
metrics-export-port: "8080"
dashboard-agent-listen-port: "52365"
{{- end -}}

{{- define "adakv.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
{{- end -}}

{{/* A pod template: root, kind (head or worker), group (its values). */}}
{{- define "adakv.pod" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $isWorker := eq .kind "worker" -}}
metadata:
  labels:
    {{- include "adakv.rayLabels" $root | nindent 4 }}
  {{- with .group.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  # A Service called `vllm` would become a variable that vLLM reads.
  enableServiceLinks: false
  {{- if $isWorker }}
  # The head's autoscaler speaks to Kubernetes; engines have no reason to.
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ add (int .group.drainSeconds) 30 }}
  {{- end }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    runAsGroup: 1000
    fsGroup: 1000
    seccompProfile:
      type: RuntimeDefault
    sysctls:
      - name: net.ipv4.ip_local_port_range
        value: {{ printf "%d %d" (int $values.localPorts.min) (int $values.localPorts.max) | quote }}
  containers:
    - name: ray-{{ .kind }}
      image: {{ printf "%s:%s" $values.image.repository ($values.image.tag | default $root.Chart.AppVersion) }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- include "adakv.containerSecurity" $root | nindent 8 }}
      ports:
        {{- if not $isWorker }}
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        {{- end }}
        - name: metrics
          containerPort: 8080
        - name: serve
          containerPort: 8000
      env:
        {{- if $values.store.redis.enabled }}
        - name: ADAKV_STORE_PASSWORD
          valueFrom:
            secretKeyRef:
              name: {{ $values.secrets.store }}
              key: password
        - name: ADAKV_STORE_URL
          value: redis://:$(ADAKV_STORE_PASSWORD)@{{ $root.Release.Name }}-redis:6390/0
        {{- else }}
        - name: ADAKV_STORE_URL
          valueFrom:
            secretKeyRef:
              name: {{ $values.secrets.store }}
              key: url
        {{- end }}
        {{- with $values.secrets.modelHub }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ . }}
              key: token
        {{- end }}
        {{- if $values.secrets.tls }}
        - name: ADAKV_TLS_CERTIFICATE
          value: /etc/adakv/tls/tls.pem
        {{- end }}
        {{- if not (dig "replica" "placement_group_bundles" nil $values.app) }}
        # No engine spans pods, so that its process group need not leave its own.
        - name: GLOO_SOCKET_IFNAME
          value: lo
        {{- end }}
        {{- with $values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        {{- $resources := dict "cpu" (int .group.cpus) "memory" .group.memory }}
        {{- if and $isWorker $values.gpu.enabled }}
        {{- $_ := set $resources $values.gpu.resource (include "adakv.gpus" $root | int) }}
        {{- end }}
        {{- dict "requests" $resources "limits" $resources | toYaml | nindent 8 }}
      {{- if $isWorker }}
      # KubeRay checks the head and all raylets by itself. A pod gets clients' requests while the
      # application answers through it.
      readinessProbe:
        httpGet:
          path: /health
          port: serve
          {{- if $values.secrets.tls }}
          scheme: HTTPS
          {{- end }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      lifecycle:
        preStop:
          # Streams through this pod go on, while its address is taken out of services.
          exec:
            command: [sleep, {{ int .group.drainSeconds | quote }}]
      {{- end }}
      volumeMounts:
        - name: shared-memory
          mountPath: /dev/shm
        {{- if $values.secrets.apiKeys }}
        # The whole folder: a single file would not follow changes of the Secret.
        - name: keys
          mountPath: /etc/adakv/keys
          readOnly: true
        {{- end }}
        {{- if $values.secrets.tls }}
        - name: tls
          mountPath: /etc/adakv/tls
          readOnly: true
        {{- end }}
        {{- if $values.modelVolume.existingClaim }}
        - name: models
          mountPath: {{ $values.modelVolume.mountPath }}
          readOnly: true
        {{- end }}
  volumes:
    - name: shared-memory
      emptyDir:
        medium: Memory
        sizeLimit: {{ .group.sharedMemory }}
    {{- with $values.secrets.apiKeys }}
    - name: keys
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- with $values.secrets.tls }}
    - name: tls
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- with $values.modelVolume.existingClaim }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ . }}
        readOnly: true
    {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
