"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = getComputedStyle(document.documentElement);
  const color = (name) => root.getPropertyValue(name).trim();
  const coarse = matchMedia("(pointer: coarse)").matches;
  const config = { displayModeBar: false, responsive: true, doubleClick: "reset", scrollZoom: false };

  const axis = (given = {}) => ({
    ...given,
    automargin: false,
    gridcolor: color("--grid"),
    linecolor: color("--line"),
    zerolinecolor: color("--line"),
    tickfont: { color: color("--quiet"), size: 11 },
    title: { ...given.title, standoff: 8, font: { color: color("--quiet"), size: 12 } },
  });

  const traceOf = (trace) => {
    if (trace.type !== "heatmap") {
      const own = color(trace.meta);
      const fill = trace.fill ? { fillcolor: `${own}33` } : {}; // a range, pale
      return { ...trace, ...fill, line: { ...trace.line, color: own }, marker: { ...trace.marker, color: own } };
    }
    const change = [[0, color("--low")], [0.5, color("--middle")], [1, color("--high")]];
    const bar = { outlinewidth: 0, tickfont: { color: color("--quiet"), size: 11 }, nticks: 5 };
    return {
      ...trace,
      colorscale: trace.meta === "difference" ? change : "Viridis",
      colorbar: { ...trace.colorbar, ...bar },
    };
  };

  const layoutOf = (layout) => ({
    ...layout,
    paper_bgcolor: color("--surface"),
    plot_bgcolor: color("--surface"),
    font: { family: getComputedStyle(document.body).fontFamily, color: color("--text"), size: 12 },
    hoverlabel: {
      bgcolor: color("--surface"),
      bordercolor: color("--quiet"),
      font: { color: color("--text"), size: 13 },
    },
    xaxis: axis(layout.xaxis),
    yaxis: axis(layout.yaxis),
    dragmode: coarse ? false : "zoom", // a finger scrolls the page
  });

  const draw = () => {
    for (const [name, figure] of Object.entries(figures)) {
      const place = document.getElementById(`plot-${name}`);
      Plotly.react(place, figure.data.map(traceOf), layoutOf(figure.layout), config);
    }
  };

  draw();
  // The plots take their colours from the style sheet, which follows the scheme, and is light on paper.
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", draw);
  }
  for (const button of document.querySelectorAll("button[data-plot]")) {
    button.addEventListener("click", () => {
      const name = button.dataset.plot;
      const place = document.getElementById(`plot-${name}`);
      const size = { width: place.clientWidth, height: place.clientHeight };
      const format = button.dataset.format;
      Plotly.downloadImage(place, { format, filename: name, scale: format === "png" ? 3 : 1, ...size });
    });
  }
})();
