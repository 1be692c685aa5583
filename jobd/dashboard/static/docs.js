// Shows the document that the page names. A token that is typed in here stays in this page: it is kept nowhere.
"use strict";

// swagger-ui has a dark page of its own, by a class; here it follows the system, as all pages do.
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

// Its headings leave out the second level.
const place = document.getElementById("swagger-ui");
const level = () => {
  for (const heading of place.querySelectorAll("h3, h4, h5")) heading.setAttribute("aria-level", String(heading.tagName[1] - 1));
};
new MutationObserver(level).observe(place, { childList: true, subtree: true });

const shown = place.dataset.document;

SwaggerUIBundle({
  url: shown,
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: false,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
  syntaxHighlight: { activated: false },
  ...(shown === "/openapi.json" ? {} : { supportedSubmitMethods: [] }), // at another door
});
