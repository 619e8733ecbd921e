// Draws the dashboard with Grafana's own libraries: its units, mappings, overrides and colours, without its server.
// State timelines and tables are in no library of theirs: those are drawn here, from the same mappings, so that every
// panel has a picture. Variables and data sources, which only the server has, are left out.

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
    // "horizontal" is a line each, below one another.
    return <div>{frames.map((frame, index) =>
      <BigValue key={index} theme={theme} width={width} height={height / frames.length - 2} value={lastOf(frame)}
        colorMode={panel.options.colorMode} graphMode="none" textMode={panel.options.textMode}
        justifyMode={panel.options.justifyMode} />)}</div>;
  }
  if (panel.type === "bargauge") {
    const shown = frames.slice(0, BARS);
    return <div>{shown.map((frame, index) =>
      <BarGauge key={index} theme={theme} width={width} height={height / shown.length - 4} orientation="horizontal"
        displayMode="basic" field={frame.fields[1].config} display={frame.fields[1].display} value={lastOf(frame)}
        showUnfilled={true} />)}</div>;
  }
  return panel.type === "table" ? <Rows panel={panel} series={series} />
    : <Timeline panel={panel} frames={frames} width={width} height={height} start={start} end={end} />;
}

function Rows({ panel, series }) {
  const { excludeByName, renameByName } = panel.transformations[0].options;
  const names = [...new Set(series.flatMap(({ metric }) => Object.keys(metric)))].filter((name) => !excludeByName[name]);
  const cell = { padding: "4px 10px 4px 4px", borderBottom: "1px solid #333", textAlign: "left", whiteSpace: "nowrap" };
  return <div style={{ overflow: "hidden" }}><table style={{ fontSize: 12 }}><thead><tr>
    {names.map((name) => <th key={name} style={cell}>{renameByName[name] ?? name}</th>)}</tr></thead><tbody>
    {series.map(({ metric }, index) => <tr key={index}>
      {names.map((name) => <td key={name} style={cell}>{metric[name]}</td>)}</tr>)}</tbody></table></div>;
}

function Timeline({ panel, frames, width, height, start, end }) {
  const left = Math.min(width / 2, 16 + 7 * Math.max(8, ...frames.map((frame) => frame.fields[1].name.length)));
  const row = (height - 44) / Math.max(1, frames.length);
  const seen = new Map();
  const x = (time) => left + (time / 1000 - start) / (end - start) * (width - left - 8);
  const bands = frames.flatMap((frame, line) => {
    const [times, field] = [frame.fields[0].values, frame.fields[1]], made = [];
    for (let i = 0; i < times.length;) {
      let next = i + 1;
      while (next < times.length && field.values.at(next) === field.values.at(i) && times.at(next) - times.at(next - 1) < 3000) next++;
      const { text, color } = field.display(field.values.at(i));
      const until = next < times.length ? Math.min(times.at(next), times.at(next - 1) + 3000) : times.at(-1);
      const wide = Math.max(2, x(until) - x(times.at(i)));
      seen.set(text, color);
      made.push(<rect key={`${line} ${i}`} x={x(times.at(i))} y={line * row + 2} width={wide} height={row - 4} fill={color} opacity={0.8} />);
      if (wide > text.length * 8) made.push(<text key={`t${line} ${i}`} x={x(times.at(i)) + 5} y={line * row + row / 2 + 4}
        fill={theme.colors.getContrastText(color)} fontSize={12}>{text}</text>);
      i = next;
    }
    return [<text key={`n${line}`} x={left - 8} y={line * row + row / 2 + 4} fill="#ccccdc" fontSize={12} textAnchor="end">
      {frame.fields[1].name}</text>, ...made];
  });
  return <div><svg width={width} height={height - 40}>{bands}</svg>
    <div style={{ display: "flex", gap: 14, fontSize: 12, padding: 4 }}>{[...seen].map(([text, color]) =>
      <span key={text}><i style={{ display: "inline-block", width: 12, height: 12, background: color, marginRight: 5 }} />{text}</span>)}</div></div>;
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
