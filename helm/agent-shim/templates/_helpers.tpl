{{- define "agent-shim.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "agent-shim.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "agent-shim.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "agent-shim.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Objects outside namespaces: two releases must not share them. */}}
{{- define "agent-shim.clusterName" -}}
{{- printf "%s.%s" (include "agent-shim.fullname" .) .Release.Namespace | trunc 200 | trimSuffix "." }}
{{- end }}

{{- define "agent-shim.selectorLabels" -}}
app.kubernetes.io/name: {{ include "agent-shim.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "agent-shim.labels" -}}
{{ include "agent-shim.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* metadata of an object: (dict "root" $ "name" …), and optionally "labels", "annotations", "cluster" (no namespace). */}}
{{- define "agent-shim.metadata" -}}
{{- $root := .root -}}
name: {{ .name | quote }}
{{- if not .cluster }}
namespace: {{ $root.Release.Namespace | quote }}
{{- end }}
labels:
  {{- include "agent-shim.labels" $root | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) $root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "agent-shim.image" -}}
{{- $image := .Values.image -}}
{{- $name := $image.repository -}}
{{- with $image.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- if $image.digest -}}
{{ $name }}@{{ $image.digest }}
{{- else -}}
{{ $name }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "agent-shim.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "agent-shim.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{/* The Secret that the token is read from; empty: agents' own tokens. */}}
{{- define "agent-shim.tokenSecret" -}}
{{- $token := .Values.upstream.token -}}
{{- if eq $token.from "agentSecret" }}{{ .Values.agent.secretName }}
{{- else if eq $token.from "secret" }}{{ $token.secretName }}
{{- else if eq $token.from "value" }}{{ include "agent-shim.fullname" . }}-token
{{- end }}
{{- end }}

{{- define "agent-shim.tokenKey" -}}
{{- $token := .Values.upstream.token -}}
{{- $vendor := ternary "token" "PIPEOPS_TOKEN" (eq .Values.agent.install "chart") -}}
{{- $token.secretKey | default (ternary $vendor "token" (eq $token.from "agentSecret")) }}
{{- end }}

{{- define "agent-shim.claim" -}}
{{- .Values.store.existingClaim | default (printf "%s-store" (include "agent-shim.fullname" .)) }}
{{- end }}

{{/* Not empty where the store is a PostgreSQL database: the Secret with its URL. */}}
{{- define "agent-shim.database" -}}
{{- .Values.store.postgresql.secretName }}
{{- end }}

{{/* Not empty where files for the database are mounted. */}}
{{- define "agent-shim.databaseFiles" -}}
{{- $database := .Values.store.postgresql -}}
{{- if include "agent-shim.database" . }}{{ or $database.passwordKey $database.caSecretName $database.clientSecretName }}{{ end }}
{{- end }}

{{- define "agent-shim.agentContainers" -}}
{{- $vendor := ternary (list "pipeops-agent") (list "agent") (eq .Values.agent.install "chart") -}}
{{- .Values.agent.containers | default $vendor | toJson }}
{{- end }}

{{/* What agents call. */}}
{{- define "agent-shim.agentURL" -}}
{{- if eq .Values.mode "sidecar" -}}
http://127.0.0.1:{{ .Values.ports.legacy }}
{{- else -}}
{{ ternary "https" "http" (ne .Values.gateway.tlsSecretName "") }}://{{ include "agent-shim.fullname" . }}.{{ .Release.Namespace }}.svc:{{ .Values.gateway.service.port }}
{{- end }}
{{- end }}

{{/* The version of the MutatingAdmissionPolicy API to use; empty: none. */}}
{{- define "agent-shim.policyVersion" -}}
{{- $policy := .Values.injection.admissionPolicy -}}
{{- $found := "" -}}
{{- range $version := list "v1beta1" "v1" -}}
{{- if $.Capabilities.APIVersions.Has (printf "admissionregistration.k8s.io/%s/MutatingAdmissionPolicy" $version) -}}
{{- $found = $version -}}
{{- end -}}
{{- end -}}
{{- if eq (toString $policy.enabled) "false" -}}
{{- else if eq (toString $policy.enabled) "true" -}}
{{ $policy.apiVersion | default $found | default (ternary "v1" "v1beta1" (semverCompare ">=1.36.0-0" .Capabilities.KubeVersion.Version)) }}
{{- else if $found -}}
{{ $policy.apiVersion | default $found }}
{{- end }}
{{- end }}

{{/* The version of Kyverno's MutatingPolicy API to use; empty: none. Kubernetes' own policy is preferred to it. */}}
{{- define "agent-shim.kyvernoVersion" -}}
{{- $enabled := toString .Values.injection.kyverno.enabled -}}
{{- /* Who switched the policy off wants no other one unasked. */}}
{{- $wanted := ternary (ne (toString .Values.injection.admissionPolicy.enabled) "false") (eq $enabled "true") (eq $enabled "auto") -}}
{{- if and $wanted (not (include "agent-shim.policyVersion" .)) -}}
{{- $found := "" -}}
{{- range $version := list "v1alpha1" "v1beta1" "v1" -}}
{{- if $.Capabilities.APIVersions.Has (printf "policies.kyverno.io/%s/MutatingPolicy" $version) -}}
{{- $found = $version -}}
{{- end -}}
{{- end -}}
{{ $found | default (ternary "v1" "" (eq $enabled "true")) }}
{{- end -}}
{{- end }}

{{/* True if new pods get the sidecar by a policy. */}}
{{- define "agent-shim.injects" -}}
{{- include "agent-shim.policyVersion" . | default (include "agent-shim.kyvernoVersion" .) -}}
{{- end }}

{{/* What the schema cannot say readably: values that exclude each other. */}}
{{- define "agent-shim.validate" -}}
{{- $v := .Values -}}
{{- range $name, $port := $v.ports -}}
{{- if has (int $port) (list 8080 8090) -}}
{{- fail (printf "ports.%s is %d, which belongs to the vendor's agent in the same pod" $name (int $port)) -}}
{{- end -}}
{{- end -}}
{{- if eq (int $v.ports.legacy) (int $v.ports.admin) -}}
{{- fail "ports.legacy and ports.admin are the same" -}}
{{- end -}}
{{- if not $v.agent.podLabels -}}
{{- fail "agent.podLabels is empty: nothing tells which pods are agents" -}}
{{- end -}}
{{- if eq $v.mode "sidecar" -}}
{{- if $v.agent.hostNetwork -}}
{{- fail "agent.hostNetwork: agents in the node's network cannot have a sidecar, 127.0.0.1 is the whole node's there; use mode: gateway" -}}
{{- end -}}
{{- if $v.agent.namespaces -}}
{{- fail "agent.namespaces is for mode: gateway; a sidecar needs the ConfigMap and the Secret of its own namespace: install one release in each" -}}
{{- end -}}
{{- if and $v.networkPolicy.enabled (not $v.networkPolicy.agentEgress) -}}
{{- fail "networkPolicy.agentEgress: the policy holds for the whole pod, so it must also allow what the agent itself needs, at least the Kubernetes API" -}}
{{- end -}}
{{- end -}}
{{- include "agent-shim.validateStore" . -}}
{{- if and (eq $v.mode "gateway") (regexMatch "^[0-9]" (include "agent-shim.fullname" .)) -}}
{{- fail (printf "%s cannot be the name of a Service, which begins with a letter: set fullnameOverride" (include "agent-shim.fullname" .)) -}}
{{- end -}}
{{- $registry := $v.image.registry | default (regexFind "^([^/]*[.:][^/]*|localhost)/" $v.image.repository) -}}
{{- $nats := .Values.store.nats | default dict -}}
{{- if or .Values.store.url $nats.urlSecretName -}}
{{- fail "store.url and store.nats: stores in NATS are gone; several replicas need store.postgresql.secretName (UPGRADING.md)" -}}
{{- end -}}
{{- if not (or $registry $v.image.allowBareName) -}}
{{- fail "image.registry is missing: where you pushed the image, for example --set image.registry=registry.example.com/team (image.allowBareName=true if the nodes have an image of that bare name)" -}}
{{- end -}}
{{- range list "127.0.0.1" "localhost" "[::1]" -}}
{{- if regexMatch (printf "^(http|ws)s?://%s:%v(/|$)" (replace "[" "\\[" . | replace "]" "\\]") $v.ports.legacy) $v.upstream.url -}}
{{- fail "upstream.url is the shim's own address: give the controller's" -}}
{{- end -}}
{{- end -}}
{{- if regexMatch "(?i)[?&][^=&]*(token|secret|password|api_?key)" $v.upstream.url -}}
{{- fail "upstream.url must not contain a token: upstream.token.from says where it comes from" -}}
{{- end -}}
{{- $token := $v.upstream.token -}}
{{- if and (eq $token.from "secret") (not $token.secretName) -}}
{{- fail "upstream.token.secretName is missing: upstream.token.from is secret" -}}
{{- end -}}
{{- if and (eq $token.from "value") (not $token.value) -}}
{{- fail "upstream.token.value is missing: upstream.token.from is value" -}}
{{- end -}}
{{- if and $token.value (ne $token.from "value") -}}
{{- fail "upstream.token.value is given, but upstream.token.from is not value" -}}
{{- end -}}
{{- $config := $v.config -}}
{{- if not (dig "upstream" "allow_insecure" false $config) -}}
{{- range $name, $url := dict "upstream.url" $v.upstream.url "config.fallback.url" (dig "fallback" "url" "" $config) -}}
{{- if and (regexMatch "^(http|ws)://" $url) (not (regexMatch "^(http|ws)://(127(\\.[0-9]+){3}|localhost|\\[::1\\])([:/?]|$)" $url)) -}}
{{- fail (printf "%s is not encrypted: tokens can be read on the way, unless config.upstream.allow_insecure is true the shim refuses it" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (dig "fallback" "use_upstream_token" false $config) (eq $token.from "agent") -}}
{{- fail "config.fallback.use_upstream_token: there is no upstream token where upstream.token.from is agent" -}}
{{- end -}}
{{- if and (eq $v.mode "gateway") (eq (dig "listen" "auth" "auto" $config) "off") -}}
{{- fail "config.listen.auth: off is for 127.0.0.1, a gateway is reachable from other pods" -}}
{{- end -}}
{{- range $v.extraVolumes -}}
{{- if not (hasPrefix "agent-shim-" .name) -}}
{{- fail (printf "extraVolumes: the name %s must begin with agent-shim-, so that it is not one of the agent's and goes with the sidecar" .name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The same for the store: a file, or a database with any number of replicas. */}}
{{- define "agent-shim.validateStore" -}}
{{- $v := .Values -}}
{{- $database := $v.store.postgresql -}}
{{- if and $v.store.existingClaim (ne $v.store.type "pvc") -}}
{{- fail "store.existingClaim is given, but store.type is not pvc" -}}
{{- end -}}
{{- range $v.extraEnv -}}
{{- if regexMatch "^SHIM_(STORE|CLUSTER)__" .name -}}
{{- fail (printf "extraEnv: %s is the chart's to set; a database's URL stands in a Secret: store.postgresql.secretName" .name) -}}
{{- end -}}
{{- if or (hasPrefix "SHIM_" .name) (eq .name "POD_IP") -}}
{{- fail (printf "extraEnv: %s would hide what the chart sets, and a variable beats the file, so that a change of config needed a restart; use config, upstream, admin or ports" .name) -}}
{{- end -}}
{{- if and (eq .name "PGPASSWORD") .value -}}
{{- fail "extraEnv: PGPASSWORD would stand in the Deployment and in the release's history; put the password into the Secret: store.postgresql.passwordKey" -}}
{{- end -}}
{{- end -}}
{{- if not (include "agent-shim.database" .) -}}
{{- if and (eq $v.mode "gateway") (gt (int $v.gateway.replicas) 1) -}}
{{- fail "gateway.replicas: a file has one writer; more than one replica needs a database (store.postgresql.secretName)" -}}
{{- end -}}
{{- if or $database.passwordKey $database.caSecretName $database.clientSecretName -}}
{{- fail "store.postgresql.secretName is missing: the Secret with the database's URL" -}}
{{- end -}}
{{- else -}}
{{- if eq $v.mode "sidecar" -}}
{{- fail "store.postgresql is for mode: gateway; a sidecar has its own file" -}}
{{- end -}}
{{- if eq $v.store.type "pvc" -}}
{{- fail "store.type: pvc is for a file; with store.postgresql there is none (agent-shim store copy moves what is in it)" -}}
{{- end -}}
{{- if has (int $v.ports.cluster) (list (int $v.ports.legacy) (int $v.ports.admin)) -}}
{{- fail "ports.cluster is the same as ports.legacy or ports.admin" -}}
{{- end -}}
{{- if ge (int $v.gateway.drainSeconds) (sub (int $v.gateway.terminationGracePeriodSeconds) 5) -}}
{{- fail "gateway.terminationGracePeriodSeconds must be more than 5 s longer than gateway.drainSeconds" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The shim's configuration file. */}}
{{- define "agent-shim.config" -}}
{{- $ours := dict
  "mode" "websocket"
  "listen" (dict "host" "127.0.0.1" "port" (int .Values.ports.legacy))
  "admin" (dict "port" (int .Values.ports.admin))
  "store" (dict "path" "/var/lib/agent-shim/data/agent-shim.db") -}}
{{- if .Values.admin.tokenSecret }}{{ $_ := set (get $ours "admin") "token_file" "/var/run/agent-shim-admin/token" }}{{ end -}}
{{- $upstream := dict -}}
{{- with include "agent-shim.tokenSecret" . }}{{ $_ := set $upstream "token_file" "/var/run/agent-shim/token" }}{{ end -}}
{{- with .Values.upstream.url }}{{ $_ := set $upstream "url" . }}{{ end -}}
{{- with $upstream }}{{ $_ := set $ours "upstream" . }}{{ end -}}
{{- if and (eq .Values.mode "gateway") .Values.gateway.tlsSecretName -}}
{{- $tls := dict "cert_file" "/etc/agent-shim-tls/tls.crt" "key_file" "/etc/agent-shim-tls/tls.key" -}}
{{- $_ := set (get $ours "listen") "tls" $tls -}}
{{- /* A TLS connection takes about 50 KiB: the default of 2048 would not fit into the default memory limit. */}}
{{- $_ := set (get $ours "listen") "max_connections" 1024 -}}
{{- end -}}
{{- if include "agent-shim.database" . -}}
{{- $database := .Values.store.postgresql -}}
{{- $store := dict -}}
{{- if $database.passwordKey }}{{ $_ := set $store "password_file" "/var/run/agent-shim-database/password" }}{{ end -}}
{{- if $database.caSecretName }}{{ $_ := set $store "ca_file" "/var/run/agent-shim-database/ca.crt" }}{{ end -}}
{{- if $database.clientSecretName -}}
{{- $_ := set $store "client_cert_file" "/var/run/agent-shim-database/client.crt" -}}
{{- $_ := set $store "client_key_file" "/var/run/agent-shim-database/client.key" -}}
{{- end -}}
{{- if $database.allowInsecure }}{{ $_ := set $store "allow_insecure" true }}{{ end -}}
{{- $_ := set $ours "store" $store -}}
{{- $_ := set $ours "cluster" (dict "port" (int .Values.ports.cluster)) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $ours (deepCopy .Values.config)) }}
{{- end }}
