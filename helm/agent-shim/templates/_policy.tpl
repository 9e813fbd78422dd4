{{/* The spec of the policy: which pods are agents, and the patches for them. Kubernetes and Kyverno read the same text. */}}
{{- define "agent-shim.policySpec" -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
failurePolicy: {{ .Values.injection.admissionPolicy.failurePolicy }}
# Other policies and webhooks may add containers after us; whoever is called again finds its work done.
reinvocationPolicy: IfNeeded
matchConstraints:
  matchPolicy: Equivalent
  namespaceSelector:
    matchExpressions:
      - key: kubernetes.io/metadata.name
        operator: In
        values:
          {{- toYaml (.Values.agent.namespaces | default (list .Release.Namespace)) | nindent 10 }}
  objectSelector:
    matchExpressions:
      - key: agent-shim/inject
        operator: NotIn
        values: [disabled]
  resourceRules:
    - apiGroups: [""]
      apiVersions: [v1]
      operations: [CREATE]
      resources: [pods]
      scope: Namespaced
matchConditions:
  - name: is-an-agent
    expression: >-
      ({{ include "agent-shim.celIsAgent" . }}) && object.spec.containers.exists(c, c.name in {{ include "agent-shim.agentContainers" . }})
  {{- if $sidecar }}
  - name: has-its-own-network
    expression: "!has(object.spec.hostNetwork) || !object.spec.hostNetwork"
  - name: has-no-sidecar-yet
    expression: '!has(object.spec.initContainers) || !object.spec.initContainers.exists(c, c.name == "agent-shim")'
  # A name that is taken would make the API server refuse the pod. It is left as it is, and the gap shows it.
  - name: no-container-has-our-name
    expression: '!object.spec.containers.exists(c, c.name == "agent-shim")'
  - name: no-volume-has-our-name
    expression: >-
      !has(object.spec.volumes) || !object.spec.volumes.exists(v, v.name in {{ include "agent-shim.volumeNames" . }})
  {{- if not .Values.upstream.url }}
  # The sidecar has none of the agent's variables, and would not start with such a URL. The gap shows such a pod as well.
  - name: url-refers-to-no-variable
    expression: >-
      !object.spec.containers.exists(c, c.name in {{ include "agent-shim.agentContainers" . }} && has(c.env) &&
      c.env.exists(e, e.name == "PIPEOPS_API_URL" && has(e.value) && e.value.contains("$(")))
  {{- end }}
  {{- else }}
  - name: calls-somebody-else
    expression: >-
      !object.spec.containers.exists(c, c.name in {{ include "agent-shim.agentContainers" . }} && has(c.env) &&
      c.env.exists(e, e.name == "PIPEOPS_API_URL" && has(e.value) && e.value == {{ include "agent-shim.agentURL" . | toJson }}))
  {{- end }}
variables:
  - name: index
    expression: >-
      object.spec.containers.map(c, c.name in {{ include "agent-shim.agentContainers" . }}).indexOf(true)
  - name: agent
    expression: object.spec.containers[variables.index]
  - name: names
    expression: "has(variables.agent.env) ? variables.agent.env.map(e, e.name) : []"
  # Of several entries with one name the last one counts.
  - name: url
    expression: 'variables.names.lastIndexOf("PIPEOPS_API_URL")'
  - name: env
    expression: '"/spec/containers/" + string(variables.index) + "/env"'
  - name: place
    expression: 'variables.env + "/" + string(variables.url < 0 ? 0 : variables.url)'
  - name: movesURL
    expression: {{ include "agent-shim.celMovesURL" . | quote }}
mutations:
  # Not an ApplyConfiguration: that may not set args, capabilities, secretKeyRef and other atomic fields.
  - patchType: JSONPatch
    jsonPatch:
      expression: |-
        {{- if $sidecar }}
        (has(object.spec.initContainers) ? [] : [JSONPatch{op: "add", path: "/spec/initContainers", value: []}]) +
        (has(object.spec.volumes) ? [] : [JSONPatch{op: "add", path: "/spec/volumes", value: []}]) +
        [
          JSONPatch{op: "add", path: "/spec/initContainers/0", value:
            {{- include "agent-shim.celContainer" . | nindent 12 }}},
          {{- /* Ours first, as Kustomize has it. */}}
          {{- range reverse (include "agent-shim.volumes" . | fromYamlArray) }}
          JSONPatch{op: "add", path: "/spec/volumes/0", value:
            {{- include "agent-shim.cel" (dict "value" . "type" "Object.spec.volumes") | nindent 12 }}},
          {{- end }}
          {{- /* The labels are there: is-an-agent asks for some. */}}
          JSONPatch{op: "add", path: "/metadata/labels/agent-shim~1sidecar", value: "enabled"}
        ] +
        {{- with include "agent-shim.celMoveURL" . }}
        {{- . | nindent 8 }} +
        {{- end }}
        {{- if and (eq .Values.store.type "pvc") .Values.podSecurityContext.fsGroup }}
        (!has(object.spec.securityContext) ?
          [JSONPatch{op: "add", path: "/spec/securityContext", value: Object.spec.securityContext{fsGroup: {{ int .Values.podSecurityContext.fsGroup }}}}] :
          has(object.spec.securityContext.fsGroup) ? [] :
          [JSONPatch{op: "add", path: "/spec/securityContext/fsGroup", value: {{ int .Values.podSecurityContext.fsGroup }}}]) +
        {{- end }}
        {{- end }}
        {{- /* A list of typed objects as the value of a patch makes the API server panic: the list first, then what is in it. */}}
        (has(variables.agent.env) ? [] : [JSONPatch{op: "add", path: variables.env, value: []}]) +
        [
          JSONPatch{
            op: variables.url < 0 ? "add" : "replace",
            path: variables.place,
            value: Object.spec.containers.env{name: "PIPEOPS_API_URL", value: {{ include "agent-shim.agentURL" . | toJson }}}
          }
        ]
{{- end }}
