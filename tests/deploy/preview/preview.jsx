// Draws the dashboard with Grafana's own libraries: its units, mappings, overrides and colours, without its server.
// What only the server has (variables, data sources, the state timeline and tables) is left out.

import React from "react";
import { createRoot } from "react-dom/client";
import { FieldType, ThemeContext, createTheme, dateTime, getDisplayProcessor, toDataFrame } from "@grafana/data";
import { BarGauge, BigValue, GlobalStyles, PanelChrome, TimeSeries } from "@grafana/ui";

const theme = createTheme({ colors: { mode: "dark" } });
const WIDTH = 1500;
const CELL = WIDTH / 24;
const ROW = 36;
const BARS = 8;

// What the time series panel adds to a field's options when it is loaded by the server.
const CUSTOM = {
  drawStyle: "line", lineInterpolation: "linear", axisPlacement: "auto", pointSize: 5, barAlignment: 0,
  showPoints: "never", scaleDistribution: { type: "linear" }, gradientMode: "none",
  hideFrom: { legend: false, tooltip: false, viz: false }, thresholdsStyle: { mode: "off" },
};

function setPath(target, path, value) {
  const keys = path.split(".");
  const last = keys.pop();
  for (const key of keys) target = target[key] ??= {};
  target[last] = value;
}

function configOf(panel, name) {
  const config = structuredClone(panel.fieldConfig.defaults);
  config.displayName = name;
  config.color ??= { mode: "palette-classic" };
  config.custom = { ...CUSTOM, ...config.custom };
  for (const { matcher, properties } of panel.fieldConfig.overrides ?? []) {
    if (new RegExp(matcher.options.replace(/^\/|\/$/g, "")).test(name)) {
      for (const { id, value } of properties) setPath(config, id, value);
    }
  }
  return config;
}

function frameOf(panel, series, index) {
  const frame = toDataFrame({
    name: series.name,
    fields: [
      { name: "Time", type: FieldType.time, values: series.values.map(([time]) => time * 1000), config: {} },
      {
        name: series.name, type: FieldType.number, config: configOf(panel, series.name), labels: {},
        values: series.values.map(([, text]) => (text === "NaN" ? null : Number(text.replace("Inf", "Infinity")))),
      },
    ],
  });
  for (const field of frame.fields) {
    field.state = { seriesIndex: index };
    field.display = getDisplayProcessor({ field, theme, timeZone: "utc" });
  }
  return frame;
}

function lastOf(frame) {
  const field = frame.fields[1];
  return { ...field.display(field.values.at(-1)), title: field.name };
}

function Body({ panel, series, width, height, start, end }) {
  const frames = series.map((one, index) => frameOf(panel, one, index));
  if (panel.type === "timeseries") {
    const raw = { from: dateTime(start * 1000), to: dateTime(end * 1000) };
    return <TimeSeries frames={frames} structureRev={1} timeRange={{ ...raw, raw }} timeZone="utc"
      width={width} height={height} legend={panel.options.legend} options={panel.options} />;
  }
  if (panel.type === "stat") {
    return <div style={{ display: "flex" }}>{frames.map((frame, index) =>
      <BigValue key={index} theme={theme} width={width / frames.length - 2} height={height} value={lastOf(frame)}
        colorMode={panel.options.colorMode} graphMode="none" textMode="auto" justifyMode="auto" />)}</div>;
  }
  if (panel.type === "bargauge") {
    const shown = frames.slice(0, BARS);
    return <div>{shown.map((frame, index) =>
      <BarGauge key={index} theme={theme} width={width} height={height / shown.length - 4} orientation="horizontal"
        displayMode="basic" field={frame.fields[1].config} display={frame.fields[1].display} value={lastOf(frame)}
        showUnfilled={true} />)}</div>;
  }
  return <p style={{ color: "#999", padding: 8 }}>{panel.type}, {series.length} series: drawn by Grafana's server only</p>;
}

function Dashboard({ panels, start, end }) {
  const rows = Math.max(...panels.map(({ panel: { gridPos } }) => gridPos.y + gridPos.h));
  return <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <div style={{ position: "relative", width: WIDTH, height: rows * ROW }}>{panels.map(({ panel, series }, index) => {
      const { x, y, w, h } = panel.gridPos;
      const size = { width: w * CELL - 8, height: h * ROW - 8 };
      const style = { position: "absolute", left: x * CELL, top: y * ROW, ...size };
      if (panel.type === "row") {
        return <div key={index} style={{ ...style, fontWeight: 600, padding: 6 }}>{panel.title}</div>;
      }
      return <div key={index} style={style}>
        <PanelChrome title={panel.title} {...size}>{(width, height) =>
          <Body {...{ panel, series, width, height, start, end }} />}</PanelChrome>
      </div>;
    })}</div>
  </ThemeContext.Provider>;
}

fetch("data.json")
  .then((answer) => answer.json())
  .then((data) => createRoot(document.getElementById("root")).render(<Dashboard {...data} />));
