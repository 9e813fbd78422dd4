// A small agent with npm's `ws`, after the vendor's guide. Arguments and output: see python_agent.py.
'use strict';

const WebSocket = require('ws');

const [url, token, agentId, name, intervalMs] = process.argv.slice(2);
let number = 0;
let delayMs = 50;

function tell(event, more = {}) {
  process.stdout.write(`${JSON.stringify({ event, ...more })}\n`);
}

function connect() {
  const ws = new WebSocket(`${url}?token=${token}`);
  let heartbeat = null;

  const send = (type, payload, requestId) => {
    if (ws.readyState !== WebSocket.OPEN) return;
    ws.send(JSON.stringify({ type, request_id: requestId, payload, timestamp: new Date().toISOString() }));
  };
  const beat = (clusterId) => {
    send('heartbeat', { cluster_id: clusterId, agent_id: agentId, status: 'available', tunnel_status: 'connected' });
  };

  ws.on('open', () => {
    tell('connected');
    number += 1;
    const payload = { agent_id: agentId, name, k8s_version: '1.27.0', agent_version: '1.0.0' };
    send('register', payload, `req_${number}`);
  });
  ws.on('message', (data) => {
    const { type, payload, request_id: requestId } = JSON.parse(data);
    if (type === 'register_success') {
      tell('registered', { cluster_id: payload.cluster_id, status: payload.status });
      beat(payload.cluster_id);
      heartbeat = setInterval(() => beat(payload.cluster_id), Number(intervalMs));
    } else if (type === 'ping') {
      send('pong', { timestamp: new Date().toISOString() }, requestId);
    } else if (type === 'command') {
      send('command_result', { command_id: payload.command_id, success: true, output: 'done' }, requestId);
    } else {
      tell(type, { error: payload.error || '' });
    }
  });
  ws.on('error', () => {}); // a close follows
  ws.on('close', (code) => {
    tell('closed', { reason: String(code) });
    clearInterval(heartbeat);
    setTimeout(connect, delayMs);
    delayMs = Math.min(delayMs * 2, 60000);
  });
}

connect();
