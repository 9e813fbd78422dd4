{{/* The container with the shim, as YAML; the same in agents' pods, in the gateway's and in the test's. */}}
{{- define "agent-shim.container" -}}
name: agent-shim
image: {{ include "agent-shim.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [run, --config, /etc/agent-shim/config.yaml]
env:
  {{- include "agent-shim.env" . | nindent 2 }}
ports:
  - name: shim-admin
    containerPort: {{ .Values.ports.admin }}
    protocol: TCP
startupProbe:
  {{- include "agent-shim.probe" (dict "path" "/readyz" "period" 1 "failures" 60) | nindent 2 }}
readinessProbe:
  {{- include "agent-shim.probe" (dict "path" "/readyz" "period" 10 "failures" 3) | nindent 2 }}
livenessProbe:
  {{- include "agent-shim.probe" (dict "path" "/healthz" "period" 10 "failures" 6) | nindent 2 }}
{{- with .Values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
terminationMessagePath: /dev/termination-log
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  {{- include "agent-shim.volumeMounts" . | nindent 2 }}
{{- end }}

{{- define "agent-shim.probe" -}}
httpGet:
  path: {{ .path }}
  port: shim-admin
  scheme: HTTP
periodSeconds: {{ .period }}
timeoutSeconds: 3
successThreshold: 1
failureThreshold: {{ .failures }}
{{- end }}

{{/* The admin port: probes and Prometheus come to the pod's address, `kubectl port-forward` to loopback. */}}
{{- define "agent-shim.env" -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      apiVersion: v1
      fieldPath: status.podIP
- name: SHIM_ADMIN__HOST
  value: '["127.0.0.1","$(POD_IP)"]'
{{- if eq .Values.mode "gateway" }}
- name: SHIM_LISTEN__HOST
  valueFrom:
    fieldRef:
      apiVersion: v1
      fieldPath: status.podIP
{{- end }}
{{- if include "agent-shim.database" . }}
- name: SHIM_STORE__URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.store.postgresql.secretName | quote }}
      key: {{ .Values.store.postgresql.urlKey | quote }}
- name: SHIM_CLUSTER__HOST
  valueFrom:
    fieldRef:
      apiVersion: v1
      fieldPath: status.podIP
- name: SHIM_CLUSTER__REPLICA
  valueFrom:
    fieldRef:
      apiVersion: v1
      fieldPath: metadata.name
{{- end }}
{{- if and (not .Values.upstream.url) (eq .Values.agent.install "manifest") }}
- name: SHIM_UPSTREAM__URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.agent.secretName | quote }}
      key: PIPEOPS_API_URL
      optional: true
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The empty one stands where Kubernetes would mount the ServiceAccount's token: the shim never talks to that API. */}}
{{- define "agent-shim.volumeMounts" -}}
- name: agent-shim-config
  mountPath: /etc/agent-shim
  readOnly: true
{{- if not (include "agent-shim.database" .) }}
- name: agent-shim-store
  mountPath: /var/lib/agent-shim
{{- end }}
- name: agent-shim-empty
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- if include "agent-shim.tokenSecret" . }}
- name: agent-shim-token
  mountPath: /var/run/agent-shim
  readOnly: true
{{- end }}
{{- if .Values.admin.tokenSecret }}
- name: agent-shim-admin
  mountPath: /var/run/agent-shim-admin
  readOnly: true
{{- end }}
{{- if and (eq .Values.mode "gateway") .Values.gateway.tlsSecretName }}
- name: agent-shim-tls
  mountPath: /etc/agent-shim-tls
  readOnly: true
{{- end }}
{{- if include "agent-shim.databaseFiles" . }}
- name: agent-shim-database
  mountPath: /var/run/agent-shim-database
  readOnly: true
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Modes are decimal here: 292 is 0444, readable for whatever user the pod runs as. */}}
{{- define "agent-shim.volumes" -}}
- name: agent-shim-config
  configMap:
    name: {{ include "agent-shim.fullname" . | quote }}
    defaultMode: 292
{{- if not (include "agent-shim.database" .) }}
- name: agent-shim-store
{{- if eq .Values.store.type "pvc" }}
  persistentVolumeClaim:
    claimName: {{ include "agent-shim.claim" . | quote }}
{{- else }}
  emptyDir:
    sizeLimit: {{ .Values.store.sizeLimit | quote }}
{{- end }}
{{- end }}
- name: agent-shim-empty
  emptyDir:
    sizeLimit: 1Mi
{{- if include "agent-shim.tokenSecret" . }}
- name: agent-shim-token
  secret:
    secretName: {{ include "agent-shim.tokenSecret" . | quote }}
    items:
      - key: {{ include "agent-shim.tokenKey" . | quote }}
        path: token
    defaultMode: 292
{{- end }}
{{- with .Values.admin.tokenSecret }}
- name: agent-shim-admin
  secret:
    secretName: {{ . | quote }}
    items:
      - key: {{ $.Values.admin.tokenKey | quote }}
        path: token
    defaultMode: 292
{{- end }}
{{- if and (eq .Values.mode "gateway") .Values.gateway.tlsSecretName }}
- name: agent-shim-tls
  secret:
    secretName: {{ .Values.gateway.tlsSecretName | quote }}
    defaultMode: 288
{{- end }}
{{- if include "agent-shim.databaseFiles" . }}
{{- $database := .Values.store.postgresql }}
- name: agent-shim-database
  projected:
    # 0440: the driver refuses a key that everybody may read. The pod's fsGroup may read it.
    defaultMode: 288
    sources:
      {{- with $database.passwordKey }}
      - secret:
          name: {{ $database.secretName | quote }}
          items:
            - {key: {{ . | quote }}, path: password}
      {{- end }}
      {{- with $database.caSecretName }}
      - secret:
          name: {{ . | quote }}
          items:
            - {key: {{ $database.caKey | quote }}, path: ca.crt}
      {{- end }}
      {{- with $database.clientSecretName }}
      - secret:
          name: {{ . | quote }}
          items:
            - {key: {{ $database.clientCertKey | quote }}, path: client.crt}
            - {key: {{ $database.clientKeyKey | quote }}, path: client.key}
      {{- end }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "agent-shim.podSpec" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  {{- include "agent-shim.volumes" . | nindent 2 }}
{{- end }}
