"use strict";
/* Helpers: elements, numbers, the packed data.  Text reaches the page through text nodes alone. */

const $ = (selector, root = document) => root.querySelector(selector);

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

async function unpack(id) {
  const text = atob($(id).textContent.trim());
  const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function shortNumber(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(digits + 1));
}

function probability(logprob) {
  if (logprob === null || logprob === undefined) return "–";
  const value = Math.exp(logprob);
  if (value >= 0.001) return (100 * value).toFixed(1) + " %";
  return value === 0 ? "0" : value.toExponential(1);
}

function signed(value) {
  return (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);
}

function tableOf(head, lines) {
  return el("div", { class: "scroll", tabindex: "0" }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...lines.map((cells) => el("tr", {}, ...cells.map((text) => el("td", { class: "n" }, text)))))));
}

const remembered = {
  get: (name) => { try { return sessionStorage.getItem("vpd-report-" + name); } catch { return null; } },
  set: (name, value) => { try { sessionStorage.setItem("vpd-report-" + name, value); } catch { /* none here */ } },
};
